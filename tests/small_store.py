"""Small stores, made by the package's own functions."""

import copy
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from lengthwise import config as config_module
from lengthwise.esm2.download import fetch
from lengthwise.esm2.heads import head_facts
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


class SmallStore:
    """A store of the tiny model, taken through the workflow's steps one call at a time."""

    def __init__(self, folder: Path, checkpoint: Path, **config):
        self.folder, self.path = folder, folder / "results" / "tiny"
        config = {"inputs": ["any.fasta"], "model": str(checkpoint), "device": "cpu", **config}
        self.config = config_module.validate(config, ROOT / "workflow" / "schemas" / "config.schema.yaml")
        self.receipt = fetch(self.config["model"], "no weights are fetched from here")
        self.receipt |= head_facts(Path(self.receipt["path"]), self.config["outputs"])
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
        self, *datasets: str, job_seconds: float = 1200.0, shard_bytes: int = 1 << 30, **options: bool | str
    ) -> pd.DataFrame:
        sequences = {name: self.inputs(name) / "sequences.parquet" for name in datasets or self.datasets}
        self.jobs = plan(self.path, sequences, Sizes(job_seconds, shard_bytes), self.jobs_tsv, **options)
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
