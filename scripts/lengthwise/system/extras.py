"""Packages that an extra of pyproject.toml brings: which one is missing, and what to type."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lengthwise.errors import LengthwiseError

# The modules of each extra's packages. The first are those that a plain installation brings, which is enough to read.
_ZSTD = () if sys.version_info >= (3, 14) else ("backports.zstd",)
MODULES = {
    "": ("numpy", "pyarrow", "crc32c", "duckdb", "pandas"),
    "embed": (
        "torch",
        "esm",
        "requests",
        "filelock",
        "huggingface_hub",
        "safetensors",
        "tqdm",
        "isal",
        *_ZSTD,
        "psutil",
        "pynvml",
    ),
    "workflow": ("snakemake", "jsonschema", "yaml", "h5py", "matplotlib", "jinja2"),
}


def require_workflow() -> None:
    """Check that all packages of a run are installed, without importing them.

    Raises
    ------
    LengthwiseError
        One is not.
    """
    absent = [module for modules in MODULES.values() for module in modules if _is_absent(module)]
    if absent:
        raise LengthwiseError(_advice(absent, "workflow"))


@contextmanager
def named_extras() -> Iterator[None]:
    """Run a block that imports packages of extras. If one is missing, the error says which extra brings it.

    Raises
    ------
    LengthwiseError
        A package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, modules in MODULES.items():
            for module in modules:
                if f"{error.name}.".startswith((f"{module}.", f"{module.partition('.')[0]}.")) and _is_absent(module):
                    raise LengthwiseError(_advice([module], extra)) from error
        raise


def _is_absent(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # the package above it is absent
        return True


def _advice(absent: list[str], extra: str) -> str:
    clone = Path(__file__).resolve().parents[3]
    brackets = f"[{extra}]" if extra else ""
    # Lengthwise is in no index, so without a clone only the user knows where it came from.
    what = f"-e '{clone}{brackets}'" if (clone / "pyproject.toml").exists() else f"'CLONE_OR_WHEEL{brackets}'"
    needs = f"of the extra {extra!r}" if extra else "that Lengthwise needs"
    return f"not installed, {needs}: {', '.join(absent)}; run: pip install {what}"
