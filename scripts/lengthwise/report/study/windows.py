"""What windows cost in accuracy: rows joined from windows beside those of whole proteins, for a sample."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from lengthwise.esm2.costs import forecast_seconds
from lengthwise.esm2.devices import resolve_device, set_threads
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.status import Status
from lengthwise.esm2.streamed import open_engine
from lengthwise.read.dataset import Dataset
from lengthwise.store.settings import require, shape_of
from lengthwise.store.weights import location
from lengthwise.system.files import atomic, read_json
from lengthwise.system.text import count

log = logging.getLogger("lengthwise")
# More proteins change the median little.
MOST_PROTEINS = 30
COLUMNS = ["dataset", "id", "length", "windows", "deviation", "mean_deviation"]


def measure_windows(
    store: Path,
    datasets: dict[str, Path],
    device: str,
    table: Path,
    threads: int = 1,
    seconds: float = 15.0,
    residency: str = "auto",
) -> pd.DataFrame:
    """Embed proteins whole that are stored in windows, and compare.

    Parameters
    ----------
    store
        The store.
    datasets
        {dataset: its manifest.json}.
    device, threads, residency
        As for `lengthwise.jobs.embed_job.embed_job`.
    table
        The TSV to write.
    seconds
        Time for the forward passes, by forecast; one protein is compared in any case.

    Returns
    -------
    A row for each protein of the sample, which is the same in every run; the columns are explained in
    `lengthwise.report.tables.COLUMNS`.

    Raises
    ------
    LengthwiseError
        No such device or checkpoint; or a dataset is damaged.
    """
    settings = require(store)
    sample = _sample(datasets)
    rows: list[dict] = []
    if sample:
        set_threads(threads)
        layer = settings["layers"][0]
        output = Output((layer,), ("residue",), "float32")
        engine = open_engine(
            location(store)[0], resolve_device(device), settings["precision"], output, residency=residency
        )
        for ds, record_id in _within(sample, seconds, settings):
            (result,) = engine.embed([[ds.sequence(record_id).encode()]])
            if result.status[0] != Status.GOOD:
                log.info("%s: not compared: whole it does not fit, or its numbers overflow", record_id)
                continue
            whole = result.arrays[f"layer_{layer}"].astype(np.float64)
            rows.append(_compared(ds, record_id, whole))
    found = pd.DataFrame(rows, columns=COLUMNS)
    with atomic(table) as part:
        found.to_csv(part, sep="\t", index=False)
    log.info("%s in windows compared with what they are whole", count(len(found), "protein"))
    return found


def _sample(datasets: dict[str, Path]) -> list[tuple[Dataset, str]]:
    """Proteins in windows, each once, in the order of their digests, which is as good as chance."""
    found: dict[str, tuple[Dataset, str]] = {}
    for manifest in datasets.values():
        policy = read_json(manifest)["policy"] or {}
        if policy.get("long_policy") == "window":
            ds = Dataset(manifest.parent)
            selected = ds.where(f"status = 'accepted' AND length > {policy['window_residues']}")
            records = selected.records
            first = records.sort_values("digest")[["digest", "id"]].head(MOST_PROTEINS)
            found |= {digest: (ds, record_id) for digest, record_id in first.itertuples(index=False)}
    return [found[digest] for digest in sorted(found)[:MOST_PROTEINS]]


def _within(sample: list[tuple[Dataset, str]], seconds: float, settings: dict) -> list[tuple[Dataset, str]]:
    """The proteins, in their order, whose whole passes fit into this time; the shortest where none does."""
    lengths = np.array([len(ds.sequence(record_id)) for ds, record_id in sample])
    needed = forecast_seconds(lengths, shape_of(settings), settings["device"])
    chosen, left = [], seconds
    for protein, own in zip(sample, needed.tolist(), strict=True):
        if own <= left:
            chosen.append(protein)
            left -= own
    return chosen or [sample[int(lengths.argmin())]]


def _compared(ds: Dataset, record_id: str, whole: np.ndarray) -> dict:
    """The row of the table for a protein; `whole` [L, D]."""
    joined = np.asarray(ds[record_id], np.float64)
    spread = whole.std(axis=0)
    policy = ds.manifest["policy"]
    stride = policy["window_residues"] - policy["overlap"]
    return {
        "dataset": ds.name,
        "id": record_id,
        "length": len(whole),
        "windows": -(-(len(whole) - policy["overlap"]) // stride),
        "deviation": float(np.median(np.sqrt(np.square(joined - whole).mean(axis=0)) / spread)),
        "mean_deviation": float(np.median(np.abs(joined.mean(axis=0) - whole.mean(axis=0)) / spread)),
    }
