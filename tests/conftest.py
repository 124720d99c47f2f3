"""Shared by all tests: a tiny checkpoint, random proteins, small stores.

It imports little: tests/gpu must run where only torch and a few packages are.
"""

import ctypes
import os
import random
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

# A shell's background jobs ignore SIGINT, and so would runs that tests interrupt.
with suppress(ValueError):  # not in the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Workers and the runs that they start share the cores, where threads that spin while they wait take time from the others. Read
# once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import tensors, tokens
from lengthwise.esm2.checkpoint import write_random, write_random_regression
from lengthwise.esm2.fair_esm_layout import contact_regression_path
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.ingest import digests
from lengthwise.system.machine import usable_cores

TINY = ModelConfig(2, 32, 2)
MAX_WORKERS = 8  # of about a gigabyte each
MARKED_SECONDS = {"slow": 900, "huge": 4 * 3600}  # time limits of tests so marked


def pytest_xdist_auto_num_workers(config) -> int:
    """A worker for each core; none for files named one by one, which are done before workers have started."""
    named = [argument.partition("::")[0] for argument in config.args]
    cores = usable_cores()
    return 0 if all(name.endswith(".py") for name in named) else min(cores, MAX_WORKERS)


def pytest_collection_modifyitems(items) -> None:
    """The example's run and what looks at it first, so that one worker has them all; then the workflow's other runs."""
    items.sort(key=lambda item: ("example" not in item.fixturenames, "workflow" not in item.path.parts))
    for item in items:
        for marker, seconds in MARKED_SECONDS.items():
            if item.get_closest_marker(marker) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(seconds))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Two layers, 32 wide, two heads, random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    write_random(path, TINY)
    return path


@pytest.fixture(scope="session")
def tiny_with_contact_head(tmp_path_factory, tiny_checkpoint) -> Path:
    """The same weights with those of a contact head beside them."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    shutil.copy(tiny_checkpoint, path)
    write_random_regression(contact_regression_path(path), TINY)
    return path


@pytest.fixture(scope="session")
def small_store(tmp_path_factory, tiny_checkpoint):
    """Makes stores, each in a folder of its own; keywords are config keys."""

    def make(checkpoint: Path = tiny_checkpoint, folder: Path | None = None, **config):
        from small_store import SmallStore

        return SmallStore(folder or tmp_path_factory.mktemp("store"), checkpoint, **config)

    return make


@pytest.fixture(scope="session")
def random_proteins():
    """Makes {id: sequence} of n distinct random sequences; the same arguments give the same ones."""

    def make(n: int, shortest: int = 5, longest: int = 60, seed: int = 0, prefix: str = "p") -> dict[str, str]:
        source = random.Random(f"{seed} {n} {prefix}")
        letters = tokens.RESIDUES.decode()
        made: dict[str, str] = {}
        while len(made) < n:
            sequence = "".join(source.choices(letters, k=source.randint(shortest, longest)))
            if sequence not in made.values():
                made[f"{prefix}{len(made)}"] = sequence
        return made

    return make


@pytest.fixture(scope="session")
def refused():
    """Expects a LengthwiseError of one line that has all these words in it."""

    @contextmanager
    def expect(*words: str):
        with pytest.raises(LengthwiseError) as caught:
            yield caught
        line = str(caught.value)
        assert "\n" not in line
        assert [word for word in words if word not in line] == [], line

    return expect


@pytest.fixture(scope="session")
def files_in():
    """All files under a folder, temporary ones included."""

    def scan(folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file())

    return scan


@pytest.fixture(scope="session")
def digest_of():
    """The digest of a sequence given as text."""
    return lambda sequence: digests.digest(sequence.encode())


@pytest.fixture
def random_rows():
    """Makes the arrays of a shard's data tensors."""
    rng = np.random.default_rng(7)

    def make(lengths, settings: dict) -> dict[str, np.ndarray]:
        arrays = {}
        for name in tensors.names(settings["outputs"], settings["layers"]):
            n = tensors.entries(name, np.array(lengths), settings).sum()
            width = {"logits": (33,), tensors.PERPLEXITY: (), "contacts": ()}.get(name, (settings["embed_dim"],))
            half = name == "contacts" or (tensors.by_residue(name) and settings["storage_dtype"] == "float16")
            arrays[name] = rng.standard_normal((n, *width)).astype(np.float16 if half else np.float32)
        return arrays

    return make


@pytest.fixture(scope="module")
def freed_memory_is_kept():
    """For the next tensor: fair-esm's are so large that fresh pages for each take longer than the products."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    mmap_max, trim_threshold = -4, -1  # as in malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    yield
    libc.mallopt(mmap_max, 65_536)
    libc.mallopt(trim_threshold, 131_072)
    libc.malloc_trim(0)
