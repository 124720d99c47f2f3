"""Names of stores and datasets, and paths of the files in a store."""

import os
import re
from pathlib import Path

from lengthwise.esm2.sources import WEIGHTS, is_path

# The ending of quarantined files.
QUARANTINE_ENDING = ".damaged"
_COMPRESSION_ENDING = re.compile(r"\.(gz|bgz|zst)$", re.IGNORECASE)
_FASTA_ENDING = re.compile(r"\.(fasta|fas|fa|faa|fsa|mpfa|pep|seq)$", re.IGNORECASE)


def quarantined(path: Path, why: str = "") -> Path:
    """Where a file lies in quarantine; `why` is a part of its name there."""
    return path.with_name(f"{path.name}{f'.{why}' if why else ''}{QUARANTINE_ENDING}")


def store_name(model: str) -> str:
    """The name of a model's store.

    It is the model's name; of a path the file's stem or the folder's name; of an id of the hub the id in one word.

    >>> store_name("facebook/esm2_t33_650M_UR50D@main")
    'facebook--esm2_t33_650M_UR50D--main'
    """
    if is_path(model):
        path = Path(os.path.abspath(model))
        is_folder = path.is_dir() or path.name == WEIGHTS
        return dataset_name((path.parent if path.name == WEIGHTS else path).name if is_folder else path.stem)
    return re.sub(r"[/@]", "--", model)


def dataset_name(path: str | Path) -> str:
    """The name of a file's dataset: its stem without compression and FASTA endings.

    Characters other than ``A-Za-z0-9._-`` become ``_``.

    >>> dataset_name("in/My proteins.fasta.gz")
    'My_proteins'
    """
    stem = _FASTA_ENDING.sub("", _COMPRESSION_ENDING.sub("", Path(path).name))
    return re.sub(r"[^A-Za-z0-9._-]", "_", stem).lstrip(".-") or "_"


def shard_path(store: Path, shard: str) -> Path:
    return Path(store) / "shards" / shard[:2] / f"{shard}.safetensors"


def metrics_path(store: Path, shard: str) -> Path:
    return Path(store) / "metrics" / shard[:2] / f"{shard}.parquet"


def find_metrics(store: Path, shard: str) -> Path | None:
    """The file of a shard's metrics, or None. Earlier versions kept all metrics in one folder."""
    path = metrics_path(store, shard)
    return next((found for found in (path, path.parent.parent / path.name) if found.exists()), None)


def work_order_path(store: Path, job: str) -> Path:
    return store / "plan" / "jobs" / f"{job}.parquet"


def job_record_path(store: Path, job: str) -> Path:
    return store / "jobs" / f"{job}.json"


def export_path(dataset: Path | str, kind: str, store: str) -> str:
    """The file of an export that is there once the export is: of entries, or of the list of its files."""
    names = {
        "h5": "per-residue.h5",
        "pt": "files.tsv",
        "biotrainer": f"embeddings_file_{store}.h5",
        "parquet": "pooled.parquet",
    }
    return f"{dataset}/exports/{kind}/{names[kind]}"
