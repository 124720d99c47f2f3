"""Forecast: the disk, memory and time that a run will need, before anything is embedded."""

import math
import os
import shutil
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.costs import result_bytes_per_token
from lengthwise.esm2.residency import beside_weights, streamed_seconds, wave_bytes
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MEMORY_MARGIN, MOST_AT_ONCE, TRAINED_RESIDUES, ModelConfig
from lengthwise.esm2.tensors import POOLED
from lengthwise.plan.cuts import Sizes, cut_work
from lengthwise.plan.forecast_text import text
from lengthwise.plan.throughput import CARDS, HERE, Rate, card_precision, rates
from lengthwise.store.layout import layout
from lengthwise.store.settings import shape_of
from lengthwise.store.sizes import bytes_per_sequence, missing_bytes
from lengthwise.system.database import out_of_core
from lengthwise.system.files import atomic, read_json, scratch_folder, write_json

SETTINGS_SHOWN = ("model", "random_weights", "device", "precision", "layers", "outputs", "storage_dtype")
# Resident memory of Python and torch's CPU build before the weights are loaded.
PROCESS_BYTES = 0.37e9
# The report of a first run (measured); it matters for small stores only.
REPORT_BYTES = 1.32e6


def forecast(
    store: Path,
    settings: dict,
    datasets: dict[str, Path],
    sizes: Sizes,
    batch_tokens: int | str = "auto",
    threads: int = 1,
    memory_bytes: int = 1 << 30,
    exports: Collection[str] = (),
    weights: Path | None = None,
    device_like: str = "",
    residency: str = "auto",
) -> dict:
    """The work that is left, and the disk, memory and time that it needs.

    Parameters
    ----------
    store
        The store; it need not exist yet.
    settings
        Its settings, or those that it will have.
    datasets
        {dataset: the folder with its records.parquet, sequences.parquet and summary.json}.
    sizes, batch_tokens, exports, device_like, residency
        As the config has them.
    threads
        CPU threads of a job.
    memory_bytes
        Memory for joins; beyond it they spill to disk.
    weights
        Where the checkpoint is, or will be downloaded to.

    Returns
    -------
    JSON values: `datasets` (records by status, lengths), `work` (finished and left: sequences, residues, shards, jobs), `disk`
    and `memory` (bytes), `time` (seconds on one device; the first row is this store's device).

    Raises
    ------
    LengthwiseError
        A work order or a summary is damaged.
    """
    shape = shape_of(settings)
    by_dataset, wanted, left = _lengths(store, datasets, memory_bytes)
    work = _work(wanted, left, settings, sizes)
    known = rates(store, settings, shape, threads, device_like)
    card = {"card": _card(device_like, settings, shape, batch_tokens, left)} if device_like else {}
    return {
        "store": str(store),
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        **{key: settings[key] for key in SETTINGS_SHOWN},
        "datasets": [_dataset(name, folder, by_dataset[name]) for name, folder in datasets.items()],
        "work": work,
        "disk": _disk(store, settings, datasets, sizes, wanted, left, work, exports, weights),
        "memory": _memory(settings, shape, batch_tokens, threads, left, work, known[0].loaded_bytes, residency) | card,
        "time": [_time(rate, shape, left, sizes, residency == "streamed") for rate in known[: len(known) - len(card)]]
        + [_time(known[-1], shape, left, sizes, one["streamed"]) for one in card.values()],
    }


def write(made: dict, folder: Path) -> None:
    """Write forecast.json, then forecast.txt."""
    write_json(folder / "forecast.json", made)
    with atomic(folder / "forecast.txt") as part:
        part.write_text(text(made) + "\n", encoding="utf-8")


def _lengths(
    store: Path, datasets: dict[str, Path], memory_bytes: int
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, pd.DataFrame]:
    """Counts by length (length, n): of each dataset, of all distinct sequences, and of those that no finished shard holds."""
    paths = {str(folder / "sequences.parquet"): name for name, folder in datasets.items()}
    with (
        scratch_folder(store / "forecast" / ".spill") as spill,
        out_of_core("forecast", memory_bytes, spill, threads=2) as database,
    ):
        database.execute("CREATE TABLE input_files (path VARCHAR, dataset VARCHAR)")
        database.executemany("INSERT INTO input_files VALUES (?, ?)", list(map(list, paths.items())))
        database.execute("SET VARIABLE paths = ?", [list(paths)])
        database.execute(
            "CREATE VIEW inputs AS SELECT dataset, digest, length"
            " FROM read_parquet(getvariable('paths'), filename = true) JOIN input_files ON filename = path"
        )
        database.execute(
            "CREATE TABLE wanted AS SELECT digest, any_value(length) AS length FROM inputs GROUP BY digest"
        )
        _load_held(database, store)
        found = database.execute("SELECT dataset, length, count(*) AS n FROM inputs GROUP BY ALL ORDER BY ALL").df()
        by_length = "SELECT length, count(*) AS n FROM wanted{} GROUP BY length ORDER BY length"
        wanted, left = (database.execute(by_length.format(but)).df() for but in ("", " ANTI JOIN held USING (digest)"))
    return {name: found[found["dataset"] == name] for name in datasets}, wanted, left


def _load_held(database: duckdb.DuckDBPyConnection, store: Path) -> None:
    """Fill held(digest) with the sequences of finished jobs, and of finished shards of other jobs."""
    database.execute("CREATE TABLE held (digest BLOB)")
    work_orders = sorted(map(str, store.glob("plan/jobs/*.parquet")))
    if not work_orders:
        return
    job_records = [path.stem for path in store.glob("jobs/*.json")]
    shards = [path.stem for path in store.glob("shards/*/*.safetensors")]
    try:
        database.execute(
            "INSERT INTO held SELECT DISTINCT digest FROM read_parquet(?, filename = true)"
            " WHERE parse_filename(filename, true) IN (SELECT unnest(?::VARCHAR[])) OR shard IN (SELECT unnest(?::VARCHAR[]))",
            [work_orders, job_records, shards],
        )
    except duckdb.Error as error:
        what = str(error).splitlines()[0]
        raise LengthwiseError(f"{store}/plan/jobs: a damaged file ({what}); remove that file and run again") from error


def _work(wanted: pd.DataFrame, left: pd.DataFrame, settings: dict, sizes: Sizes) -> dict:
    """Sequences and residues that are finished and left, and the shards and jobs of the rest."""
    work = {f"finished_{key}": value for key, value in (_totals(wanted) - _totals(left)).items()}
    work |= _totals(left).to_dict() | {"shards": 0, "jobs": 0}
    if len(left):
        shards, jobs = cut_work(left["length"].to_numpy(), left["n"].to_numpy(), settings, sizes)
        work |= {"shards": len(shards) - 1, "jobs": len(jobs) - 1}
    return work


def _totals(lengths: pd.DataFrame) -> pd.Series:
    return pd.Series({"sequences": int(lengths["n"].sum()), "residues": int((lengths["length"] * lengths["n"]).sum())})


def _dataset(name: str, folder: Path, lengths: pd.DataFrame) -> dict:
    """Counts of a dataset's records by status, and the lengths of its distinct sequences."""
    summary = read_json(folder / "summary.json", "records", "accepted", "duplicate", "rejected", "reasons", "residues")
    length, n = lengths["length"].to_numpy(), lengths["n"].to_numpy()
    counts = ("input", "records", "accepted", "duplicate", "rejected", "reasons", "residues")
    row = {"dataset": name, **{key: summary[key] for key in counts}}
    row |= {"shortest": None, "median": None, "longest": None}
    if len(length):
        middle = int(length[np.searchsorted(np.cumsum(n), n.sum() / 2)])
        row |= {"shortest": int(length[0]), "median": middle, "longest": int(length[-1])}
    row["beyond_trained"] = int(n[length > TRAINED_RESIDUES].sum())
    return row


def _disk(
    store: Path,
    settings: dict,
    datasets: dict[str, Path],
    sizes: Sizes,
    wanted: pd.DataFrame,
    left: pd.DataFrame,
    work: dict,
    exports: Collection[str],
    weights: Path | None,
) -> dict:
    """Bytes to write, bytes free, and the bytes that smaller outputs would take in a new store."""
    # Work orders, indices, lookups and metrics take about as much as the tables that ingest made.
    share = work["sequences"] / max(work["sequences"] + work["finished_sequences"], 1)
    ingested = [
        (os.path.getsize(f / "sequences.parquet"), os.path.getsize(f / "records.parquet")) for f in datasets.values()
    ]
    tables = int(sum(share * sequences + records for sequences, records in ingested))
    free = shutil.disk_usage(store).free
    own = {"storage_dtype": settings["storage_dtype"], "outputs": settings["outputs"]}
    ways = [own | {"chosen": True, "bytes": _shard_bytes(left, settings, sizes)}]
    for other in _smaller(own):
        ways.append(other | {"chosen": False, "bytes": _shard_bytes(wanted, settings | other, sizes)})
    exported = [missing_bytes(store, settings | way, list(datasets), list(exports)) for way in ways]
    needed = [way["bytes"] + tables + int(REPORT_BYTES) + more for way, more in zip(ways, exported, strict=True)]
    return {
        "free_bytes": free,
        "needed_bytes": needed[0],
        "fits": needed[0] <= free,
        "embeddings_bytes": ways[0]["bytes"],
        "tables_bytes": tables,
        "report_bytes": int(REPORT_BYTES),
        "exports_bytes": exported[0],
        "download": _download(weights, settings) if weights and not weights.exists() else None,
        "ways": [way | {"fits": total <= free} for way, total in zip(ways, needed, strict=True)],
    }


def _smaller(own: dict) -> list[dict]:
    """Outputs that take less than `own`: residues in float16, or pooled vectors alone."""
    if "residue" not in own["outputs"]:
        return []
    pooled = [output for output in own["outputs"] if output in POOLED]
    half = [own | {"storage_dtype": "float16"}] if own["storage_dtype"] == "float32" else []
    return [*half, own | {"outputs": pooled or ["mean"]}]


def _download(weights: Path, settings: dict) -> dict:
    """The size of a checkpoint in float32 and the free bytes of its folder; `needed_bytes` does not include it."""
    shape = shape_of(settings)
    folder = next(folder for folder in weights.absolute().parents if folder.exists())
    return {"path": str(weights), "bytes": 4 * shape.parameters, "free_bytes": shutil.disk_usage(folder).free}


def _shard_bytes(lengths: pd.DataFrame, settings: dict, sizes: Sizes) -> int:
    """Bytes of the shards of these sequences: counts by length."""
    if not len(lengths):
        return 0
    length, n = lengths["length"].to_numpy(), lengths["n"].to_numpy()
    header = len(layout(length[-1:], settings)[0]) + 8
    shards, _ = cut_work(length, n, settings, sizes)
    return int((bytes_per_sequence(length, settings) * n).sum()) + header * (len(shards) - 1)


def _result_bytes(settings: dict) -> int:
    """Bytes of results per token of a batch."""
    itemsize = np.dtype(settings["storage_dtype"]).itemsize
    return result_bytes_per_token(
        settings["embed_dim"],
        len(settings["layers"]),
        settings["outputs"],
        itemsize,
        settings.get("contacts_max_residues", 0),
    )


def _itemsize(precision: str) -> int:
    return 4 if precision == "float32" else 2


def _memory(
    settings: dict,
    shape: ModelConfig,
    batch_tokens: int | str,
    threads: int,
    left: pd.DataFrame,
    work: dict,
    loaded: int | None,
    residency: str,
) -> dict:
    """The device memory of the weights, a batch and the longest sequence.

    `loaded` is the measured memory of process and weights in this store's jobs, if there is one.
    """
    device, precision = settings["device"], settings["precision"]
    longest = int(left["length"].max()) if len(left) else 0
    tokens = AUTO_BATCH_TOKENS[device] if isinstance(batch_tokens, str) else batch_tokens
    itemsize, stored = _itemsize(precision), _result_bytes(settings)
    held, streamed = shape.parameters * itemsize, residency == "streamed"
    if streamed:
        of_a_job = (work["residues"] + 2 * work["sequences"]) // max(work["jobs"], 1)
        # A GPU's wave grows into what is free; it needs a batch.
        held = wave_bytes(shape, device, itemsize, stored, int(of_a_job if device == "cpu" else min(of_a_job, tokens)))
    fixed = (None if streamed else loaded) or int(held + (PROCESS_BYTES if device == "cpu" else 0))
    at_once = min(threads, MOST_AT_ONCE) if device == "cpu" and tokens <= AUTO_BATCH_TOKENS["cpu"] else 1
    if device == "cpu":
        of_a_job = (work["residues"] + 2 * work["sequences"]) / max(work["jobs"], 1)
        usual = int(min(tokens, of_a_job))
        batch = shape.resident_bytes(itemsize, usual, threads, stored, of_a_job / max(usual, 1))
        alone = shape.resident_bytes_alone(itemsize, longest + 2, stored)
    else:
        batch, alone = (n * shape.bytes_per_token(itemsize, stored) for n in (tokens, longest + 2))
    return {
        "measure": "allocated GPU memory" if device == "cuda" else "resident memory",
        "weights_bytes": shape.parameters * itemsize,
        "loaded_bytes": fixed,
        "loaded_measured": loaded is not None,
        "batch_tokens": tokens,
        "batches_at_once": at_once,
        "batch_bytes": fixed + batch,
        "longest_residues": longest,
        "longest_bytes": fixed + alone,
    }


def _card(name: str, settings: dict, shape: ModelConfig, batch_tokens: int | str, left: pd.DataFrame) -> dict:
    """The memory of weights and a batch on a card, and the sequences that do not fit on it."""
    precision = card_precision(settings)
    weights = shape.parameters * _itemsize(precision)
    per_token = shape.bytes_per_token(_itemsize(precision), _result_bytes(settings))
    free, streamed = beside_weights(shape, _itemsize(precision), CARDS[name][0])
    fitting = max(0, int(free / per_token))
    tokens = min(fitting, AUTO_BATCH_TOKENS["cuda"]) if isinstance(batch_tokens, str) else batch_tokens
    longest = max(0, fitting - 2)
    return {
        "name": name,
        "gigabytes": CARDS[name][0] / 1e9,
        "precision": precision,
        "weights_bytes": weights,
        "streamed": streamed,
        "batch_tokens": tokens,
        "batch_bytes": int(MEMORY_MARGIN * CARDS[name][0] - free) + tokens * per_token,
        "longest_residues": longest,
        "sequences_beyond": int(left["n"][left["length"] > longest].sum()),
    }


def _time(rate: Rate, shape: ModelConfig, left: pd.DataFrame, sizes: Sizes, streamed: bool) -> dict:
    """Seconds on one device: forward passes with writing, and loading the weights once per job, or beside the passes."""
    embed = float((rate.seconds(shape, left["length"].to_numpy()) * left["n"].to_numpy()).sum())
    jobs = math.ceil(embed / sizes.job_seconds)
    seconds = embed + rate.load_seconds * jobs
    if streamed and jobs and rate.source != HERE:  # what was measured here has the reading in it
        seconds = jobs * streamed_seconds(shape, embed / jobs, rate.load_seconds)
    return {
        "device": rate.device,
        "precision": rate.precision,
        "source": rate.source,
        "seconds": round(seconds, 3),
        "seconds_low": round(rate.low * seconds, 3),
        "seconds_high": round(rate.high * seconds, 3),
        "residues_per_second": round(float(_totals(left)["residues"]) / embed, 1) if embed else None,
        "basis": rate.basis,
    }
