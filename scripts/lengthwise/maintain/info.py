"""`python -m lengthwise info`: versions, device and a store's state, to be pasted into a report of a problem."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.plan.jobs_table import job_rows
from lengthwise.store.manifest import read_manifest
from lengthwise.store.paths import QUARANTINE_ENDING
from lengthwise.store.settings import load
from lengthwise.system.locks import run_lock_holder
from lengthwise.system.machine import host_available, host_total, processor_name, usable_cores
from lengthwise.system.text import count, printable, size
from lengthwise.system.versions import git_commit

_READING = ("numpy", "safetensors", "pyarrow", "duckdb")
_EMBEDDING = ("torch", "fair-esm", "transformers", "huggingface_hub")
_WORKFLOW = ("snakemake", "snakemake-executor-plugin-slurm")
# Run by a process of its own: importing torch takes seconds, and a broken one may end the process.
_ASK_TORCH = """
import json, torch
cuda = torch.cuda
found = [(cuda.get_device_name(i), cuda.get_device_properties(i).total_memory, cuda.get_device_capability(i))
         for i in range(cuda.device_count())] if cuda.is_available() else []
print(json.dumps({"cuda": torch.version.cuda, "gpus": found, "threads": torch.get_num_threads()}))
"""
_TORCH_SECONDS = 120.0


def run(store: Path | None) -> int:
    """Print what this machine and, if one is given, a store are; returns the exit code."""
    for what, text in (*_machine(), *(_store(store) if store else ())):
        print(f"{what:<12}{printable(text)}")
    return 0


def _machine() -> Iterator[tuple[str, str]]:
    commit = git_commit()
    yield "lengthwise", __version__ + (f" (git {commit})" if commit else "")
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "packages", ", ".join(f"{name} {_version(name)}" for name in (*_READING, *_EMBEDDING, *_WORKFLOW))
    yield "processor", f"{processor_name()}, {count(usable_cores(), 'core')} to use"
    with suppress(ImportError):  # an installation that reads has no psutil
        yield "memory", f"{size(host_total())}, of which {size(host_available())} are free"
    yield "device", _device()
    if shutil.which("sbatch"):
        yield "slurm", "sbatch is there" + (", inside of a job" if "SLURM_JOB_ID" in os.environ else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _device() -> str:
    """The GPUs that torch sees, or why it sees none."""
    if _version("torch") == "missing":
        return "torch is missing: this installation reads stores"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TORCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"torch gave no answer within {_TORCH_SECONDS:.0f} s"
    if asked.returncode:
        return f"torch cannot be used: {(asked.stderr.splitlines() or ['no reason given'])[-1]}"
    found = json.loads(asked.stdout.splitlines()[-1])
    if found["cuda"] is None:
        return f"CPU, {count(found['threads'], 'thread')}: torch is a build without CUDA"
    gpus = [f"{name}, {size(memory)}, capability {major}.{minor}" for name, memory, (major, minor) in found["gpus"]]
    return f"CUDA {found['cuda']}: {'; '.join(gpus) or 'torch sees no GPU'}"


def _store(store: Path) -> Iterator[tuple[str, str]]:
    """Its settings, datasets and jobs.

    Raises
    ------
    LengthwiseError
        The folder is no store, or its settings are damaged.
    """
    settings = load(store)
    if settings is None:
        raise LengthwiseError(f"{store}: no store here (no settings.json); give results/<model>")
    keys = ("model", "layers", "outputs", "precision", "storage_dtype", "device")
    yield "store", str(store)
    yield "settings", ", ".join(f"{key} {settings[key]}" for key in keys)
    names = sorted({path.parent.name for path in store.glob("inputs/*/summary.json")})
    for name in names:
        yield "dataset", f"{name}: {_dataset(store / 'datasets' / name / 'manifest.json')}"
    with suppress(OSError):
        planned = set(job_rows(store / "plan" / "jobs.tsv"))
        finished = {path.stem for path in store.glob("jobs/*.json")}
        yield "jobs", f"{len(planned & finished)} of {len(planned)} planned ones are finished"
    shards = list(store.glob("shards/*/*.safetensors"))
    yield "shards", f"{len(shards):,}, {size(sum(path.stat().st_size for path in shards))}"
    aside = [path for path in store.rglob(f"*{QUARANTINE_ENDING}")]
    yield "quarantine", count(len(aside), "file")
    if holder := run_lock_holder(store):
        yield "run", f"at work since {holder['began']} on {holder['host']}, process {holder['process']}"


def _dataset(manifest: Path) -> str:
    try:
        found = read_manifest(manifest)
    except FileNotFoundError:
        return "not finished"
    except LengthwiseError as error:
        return str(error)
    return ", ".join(f"{found[status]:,} {status}" for status in ("accepted", "duplicate", "rejected"))
