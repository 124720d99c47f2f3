"""Shared by all tests: a tiny checkpoint, random proteins, and small stores made by the package's own functions."""

import copy
import ctypes
import os
import random
import shutil
import signal
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# A shell's background jobs ignore SIGINT, and so would runs that tests interrupt.
with suppress(ValueError):  # not in the main thread
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Workers and the runs that they start share the cores, where threads that spin while they wait take time from the others. Read
# once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import pytest

from lengthwise import config as config_module
from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import tokens
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.download import fetch
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.ingest import digests
from lengthwise.ingest.ingest import ingest
from lengthwise.ingest.judge import Policy
from lengthwise.jobs.assemble import assemble
from lengthwise.jobs.embed_job import embed_job
from lengthwise.plan.cuts import Sizes
from lengthwise.plan.planner import plan
from lengthwise.read.dataset import Dataset
from lengthwise.store import settings as settings_module
from lengthwise.store.paths import job_record_path, shard_path, work_order_path
from lengthwise.store.shard import Shard
from lengthwise.system.files import write_json

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelConfig(2, 32, 2)
MAX_WORKERS = 8  # of about a gigabyte each
MARKED_SECONDS = {"slow": 900, "huge": 4 * 3600}  # time limits of tests so marked


def pytest_xdist_auto_num_workers(config) -> int:
    """A worker for each core; none for files named one by one, which are done before workers have started."""
    named = [argument.partition("::")[0] for argument in config.args]
    cores = len(os.sched_getaffinity(0))
    return 0 if all(name.endswith(".py") for name in named) else min(cores, MAX_WORKERS)


def pytest_collection_modifyitems(items) -> None:
    """The example's run and what looks at it first, so that one worker has them all; then the workflow's other runs."""
    items.sort(key=lambda item: ("example" not in item.fixturenames, "workflow" not in item.path.parts))
    for item in items:
        for marker, seconds in MARKED_SECONDS.items():
            if item.get_closest_marker(marker) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(seconds))


class SmallStore:
    """A store of the tiny model, taken through the workflow's steps one call at a time."""

    def __init__(self, folder: Path, checkpoint: Path, **config):
        self.folder, self.path = folder, folder / "results" / "tiny"
        config = {"inputs": ["any.fasta"], "model": str(checkpoint), "device": "cpu", **config}
        self.config = config_module.validate(config, ROOT / "workflow" / "schemas" / "config.schema.yaml")
        self.receipt = fetch(self.config["model"], "no weights are fetched from here")
        self.settings = settings_module.create_or_check(self.path, self.config, self.receipt, "cpu")
        write_json(self.path / "weights.json", self.receipt)
        self.datasets: list[str] = []

    def copy(self, folder: Path) -> "SmallStore":
        """The same store elsewhere, to be changed."""
        other = copy.copy(self)
        other.folder, other.path, other.datasets = folder, folder / "results" / "tiny", [*self.datasets]
        shutil.copytree(self.path, other.path)
        return other

    @property
    def jobs_tsv(self) -> Path:
        return self.path / "plan" / "jobs.tsv"

    def inputs(self, dataset: str) -> Path:
        return self.path / "inputs" / dataset

    def ingest(self, dataset: str, proteins: Mapping[str, str], **options) -> dict:
        fasta = self.folder / f"{dataset}.fasta"
        fasta.write_text("".join(f">{record_id}\n{sequence}\n" for record_id, sequence in proteins.items()))
        names = ("records.parquet", "sequences.parquet", "summary.json")
        if dataset not in self.datasets:
            self.datasets.append(dataset)
        return ingest(fasta, *(self.inputs(dataset) / name for name in names), Policy(**options))

    def plan(
        self, *datasets: str, job_seconds: float = 1200.0, shard_bytes: int = 1 << 30, retry_rejected: bool = False
    ) -> pd.DataFrame:
        sequences = {name: self.inputs(name) / "sequences.parquet" for name in datasets or self.datasets}
        self.jobs = plan(
            self.path, sequences, Sizes(job_seconds, shard_bytes), self.jobs_tsv, retry_rejected=retry_rejected
        )
        return self.jobs

    def work_order(self, job: str) -> pd.DataFrame:
        return pd.read_parquet(work_order_path(self.path, job))

    def embed(self, job: str, **options) -> dict:
        return embed_job(self.path, work_order_path(self.path, job), job_record_path(self.path, job), **options)

    def embed_all(self, **options) -> list[dict]:
        jobs = [job for job in self.jobs["job"] if not job_record_path(self.path, job).exists()]
        return [self.embed(job, **options) for job in jobs]

    def jobs_of(self, dataset: str) -> list[str]:
        return [
            job
            for job, users in zip(self.jobs["job"], self.jobs["datasets"], strict=True)
            if dataset in users.split(",")
        ]

    def assemble(self, dataset: str, **options) -> dict:
        folder = self.path / "datasets" / dataset
        names = ("index.parquet", "rejected.tsv", "manifest.json")
        return assemble(self.path, dataset, self.jobs_of(dataset), *(folder / name for name in names), **options)

    def run(self, **sizes) -> None:
        """Plan, embed and assemble everything ingested."""
        self.plan(**sizes)
        self.embed_all()
        for dataset in self.datasets:
            self.assemble(dataset)

    def open(self, dataset: str) -> Dataset:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*RANDOM WEIGHTS")
            return Dataset(self.path / "datasets" / dataset)

    def shard_files(self) -> list[Path]:
        return sorted((self.path / "shards").rglob("*.safetensors"))

    def rows(self) -> dict[tuple[bytes, str], bytes]:
        """The bytes of every stored tensor of every sequence, whatever shard it is in."""
        found = {}
        for path in self.shard_files():
            shard = Shard(path)
            offsets = shard["offsets"]
            for i, digest in enumerate(shard["digests"]):
                for name in shard.data_names:
                    rows = slice(offsets[i], offsets[i + 1]) if name.startswith("layer_") else slice(i, i + 1)
                    found[digest.tobytes(), name] = shard[name][rows].tobytes()
        return found

    def shard_path(self, shard: str) -> Path:
        return shard_path(self.path, shard)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Two layers, 32 wide, two heads, random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    write_random(path, TINY)
    return path


@pytest.fixture(scope="session")
def small_store(tmp_path_factory, tiny_checkpoint):
    """Makes stores, each in a folder of its own; keywords are config keys."""

    def make(checkpoint: Path = tiny_checkpoint, folder: Path | None = None, **config) -> SmallStore:
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
        d, arrays = settings["embed_dim"], {}
        for layer in settings["layers"]:
            if "residue" in settings["outputs"]:
                arrays[f"layer_{layer}"] = rng.standard_normal((sum(lengths), d)).astype(settings["storage_dtype"])
            for output in ("mean", "bos"):
                if output in settings["outputs"]:
                    arrays[f"{output}_{layer}"] = rng.standard_normal((len(lengths), d)).astype(np.float32)
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
