"""Report: batch metrics, ledgers and the scaling study, as tables, figures and one page."""

import os
from pathlib import Path

import duckdb
import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
from markupsafe import Markup

from lengthwise import figures
from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.files import atomic, read_json
from lengthwise.metrics import read_metrics
from lengthwise.plan import read_jobs
from lengthwise.scaling_table import FAIR_ESM, LENGTHWISE, OK, read_scaling
from lengthwise.settings import require
from lengthwise.store import commit_path, find_metrics

MEASURES = {"allocated": "allocated GPU memory", "resident": "resident memory"}
STATUS_WORDS = {
    "skipped_time": "no time left",
    "skipped_memory": "would not have fitted in memory",
    "out_of_memory": "out of memory",
}
# Bounds of the bins of lengths: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... Engine batches do not cross the powers of two.
BOUNDS = np.unique(np.outer(2 ** np.arange(20), (1.0, 1.5)).astype(int))
FIGURES = ("throughput", "memory", "scaling_throughput", "scaling_memory")
JOBS_SHOWN = 25  # a longer table is folded


def summarize(store: Path, jobs_tsv: Path, datasets: dict[str, Path], scaling: Path, out: Path) -> dict:
    """Write the report of a store.

    Parameters
    ----------
    store
        The store; every job of `jobs_tsv` is committed in it.
    jobs_tsv
        The table that `lengthwise.plan.plan` wrote.
    datasets
        {dataset: its manifest.json}.
    scaling
        The table that `lengthwise.scaling.scaling` wrote.
    out
        The folder for metrics.tsv, by_length.tsv, an SVG and a PNG of each of `FIGURES`, and index.html, which is last.

    Returns
    -------
    The facts of the page's headline: counts of datasets, records (accepted, duplicate, rejected), sequences, residues, jobs,
    shards, batches, missing metrics and OOM splits; model, precision and random_weights; and `rates`, one for each device
    and precision that batches ran on.

    Raises
    ------
    LengthwiseError
        A job is not committed.
    """
    settings = require(store)
    commits = _read_commits(store, jobs_tsv)
    shards = list(dict.fromkeys(shard for commit in commits for shard in commit["shards"]))
    present = [path for shard in shards if (path := find_metrics(store, shard))]
    rows = read_metrics(present)
    _write_tsv(pa.Table.from_pandas(rows, preserve_index=False), out / "metrics.tsv")
    batches = _batches(rows)
    bins = bin_by_length(batches)
    _write_tsv(pa.Table.from_pandas(bins.drop(columns="group"), preserve_index=False), out / "by_length.tsv")
    study = read_scaling(scaling)
    ledger = [read_json(manifest) | {"dataset": name} for name, manifest in datasets.items()]
    facts = _facts(settings, commits, batches, ledger)
    facts |= {"shards": len(shards), "missing_metrics": len(shards) - len(present)}
    page = _template().render(
        facts=facts,
        settings=settings,
        ledger=ledger,
        figures=_figures(batches, bins, study, out),
        measures=_measures(batches),
        batches_shown=min(len(batches), figures.MAX_POINTS),
        study=_study_facts(study),
        jobs=_job_rows(commits, batches),
        jobs_shown=JOBS_SHOWN,
        versions=_versions(commits),
        scaling_link=Path(os.path.relpath(scaling, out)).as_posix(),
    )
    with atomic(out / "index.html") as part:
        part.write_text(page, encoding="utf-8")
    return facts


def bin_by_length(batches: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles of throughput and peak memory for each device, precision, measure of memory and bin of lengths.

    A bin holds the batches with length_from <= mean_length < length_to.
    """
    keys = ["group", "device", "precision", "memory_measure", "bin"]
    bin_of = np.searchsorted(BOUNDS, batches["mean_length"], side="right")
    groups = batches.assign(bin=bin_of).groupby(keys, dropna=False, sort=True)
    table = groups.agg(n_batches=("batch", "size"), median_length=("mean_length", "median")).reset_index()
    for quantity in ("residues_per_second", "peak_bytes"):
        for name, quantile in (("q25", 0.25), ("median", 0.5), ("q75", 0.75)):
            table[f"{quantity}_{name}"] = groups[quantity].quantile(quantile).to_numpy()
    number = table.pop("bin").to_numpy(dtype=int)
    table.insert(4, "length_from", BOUNDS[number - 1])
    table.insert(5, "length_to", BOUNDS[number])
    return table


def _read_commits(store: Path, jobs_tsv: Path) -> list[dict]:
    commits = []
    for job in read_jobs(jobs_tsv)["job"]:
        path = commit_path(store, job)
        if not path.exists():
            raise LengthwiseError(f"{path} is missing: the job is not finished; run snakemake to finish it")
        commits.append(read_json(path))
    return commits


def _batches(rows: pd.DataFrame) -> pd.DataFrame:
    """Metrics with what the figures draw: `residues_per_second`, `peak_bytes`, `memory_measure` and `group`."""
    numbers = ["n_residues", "mean_length", "wall_ms", "peak_allocated_bytes", "peak_rss_bytes", "oom_splits"]
    batches = rows[["job", "shard", "batch", "device", "precision", *numbers]].copy()
    batches[numbers] = batches[numbers].astype(float)  # null becomes NaN
    for name in ("job", "shard", "device", "precision"):
        batches[name] = batches[name].astype(object)
    allocated, resident = batches.pop("peak_allocated_bytes"), batches.pop("peak_rss_bytes")
    batches["peak_bytes"] = allocated.fillna(resident)
    measure = np.where(allocated.notna(), "allocated", np.where(resident.notna(), "resident", None))
    batches["memory_measure"] = pd.Series(measure, index=batches.index, dtype=object)
    batches["residues_per_second"] = batches["n_residues"] / (batches["wall_ms"] / 1000)
    batches["group"] = batches["device"] + ", " + batches["precision"]
    return batches


def _facts(settings: dict, commits: list[dict], batches: pd.DataFrame, ledger: list[dict]) -> dict:
    counts = {key: sum(row[key] for row in ledger) for key in ("records", "accepted", "duplicate", "rejected")}
    rates = [
        {
            "device": device,
            "precision": precision,
            "batches": len(here),
            "residues_per_second": float(here["n_residues"].sum() / (here["wall_ms"].sum() / 1000)),
        }
        for (device, precision), here in batches.groupby(["device", "precision"])
    ]
    return {
        "model": settings["model"],
        "precision": settings["precision"],
        "random_weights": settings["random_weights"],
        "datasets": len(ledger),
        **counts,
        "accounted": all(row["records"] == row["accepted"] + row["duplicate"] + row["rejected"] for row in ledger),
        "sequences": sum(commit["sequences"] for commit in commits),
        "residues": sum(commit["residues"] for commit in commits),
        "jobs": len(commits),
        "batches": len(batches),
        "oom_splits": int(batches["oom_splits"].sum()),
        "rates": rates,
    }


def _figures(batches: pd.DataFrame, bins: pd.DataFrame, study: pd.DataFrame, out: Path) -> dict[str, dict]:
    """Write the figures; {name: {"svg": element}, or {"reason": why there is none}}."""
    timed, sized = study[study["wall_ms"].notna()], study[study["peak_bytes"].notna()]
    measures = _measures(batches)
    drawn, missing = {}, {}
    if len(batches):
        drawn["throughput"] = figures.production(batches, bins, "residues_per_second", "Residues per second")
    else:
        missing["throughput"] = "No batch of these jobs has metrics, so there is no production throughput to show."
    if measures:
        label = f"Peak {measures[0]}" if len(measures) == 1 else "Peak memory"
        drawn["memory"] = figures.production(_with_measure(batches), _with_measure(bins), "peak_bytes", label)
    else:
        missing["memory"] = "Peak memory of production batches was not measured, so there is no figure of it."
    if len(timed):
        drawn["scaling_throughput"] = figures.scaling_throughput(study)
    else:
        missing["scaling_throughput"] = "The scaling study had no time for a single point."
    if len(sized):
        drawn["scaling_memory"] = figures.scaling_memory(study, _measures(sized)[0])
    else:
        missing["scaling_memory"] = "Memory was not measured in the scaling study on this device."
    shown = {name: {"svg": Markup(figures.save(figure, out, name))} for name, figure in drawn.items()}
    for name, reason in missing.items():
        figures.save(figures.note(reason), out, name)  # the file is there either way, and the page says it in words
        shown[name] = {"reason": reason}
    return shown


def _measures(rows: pd.DataFrame) -> list[str]:
    """How memory was measured, in words."""
    return [MEASURES[name] for name in sorted(rows["memory_measure"].dropna().unique())]


def _with_measure(table: pd.DataFrame) -> pd.DataFrame:
    """Groups that say how memory was measured, where measures differ."""
    if table["memory_measure"].nunique() < 2:
        return table
    return table.assign(group=table["group"] + ", " + table["memory_measure"].map(MEASURES).fillna("not measured"))


def _study_facts(study: pd.DataFrame) -> dict:
    """What the page says of the scaling study."""
    sized = study[study["peak_bytes"].notna()]
    device = study["device"].iloc[0] if len(study) else "no device"
    return {"device": device, "measures": _measures(sized), "ratios": _ratios(sized), "stops": _stops(study)}


def _ratios(sized: pd.DataFrame) -> list[dict]:
    """What the memory of one sequence does between 50 and 500 residues, for each engine and mode."""
    single = sized[sized["n_sequences"] == 1].set_index(["engine", "gradients", "length"])["peak_bytes"]
    ratios = []
    for engine in (LENGTHWISE, FAIR_ESM):
        for gradients in (False, True):
            short, long = (single.get((engine, gradients, length)) for length in (50, 500))
            if short and long:
                row = {"engine": engine, "gradients": gradients, "ratio": long / short}
                ratios.append(row | {"short": figures.bytes_text(short), "long": figures.bytes_text(long)})
    return ratios


def _stops(study: pd.DataFrame) -> list[str]:
    """Where series of the scaling study ended early, and why."""
    ended = study[study["status"] != OK].assign(single=study["n_sequences"] == 1)
    first = ended.sort_values("length").groupby(["engine", "gradients", "single"], sort=True).head(1)
    return [
        f"{row.engine} {'with' if row.gradients else 'without'} gradients, "
        f"{'one sequence' if row.single else 'full batches'}: from {row.length:,} residues on ({STATUS_WORDS[row.status]})"
        for row in first.itertuples()
    ]


def _job_rows(commits: list[dict], batches: pd.DataFrame) -> list[dict]:
    """One row per job; its rate counts the shards that it made itself, which is what its time went to."""
    residues = batches.groupby("shard")["n_residues"].sum().to_dict()
    splits = batches.groupby("shard")["oom_splits"].sum().to_dict()
    rows = []
    for commit in commits:
        made, seconds = commit["made"], commit["embed_seconds"]
        timed = made and seconds and all(shard in residues for shard in made)
        rate = sum(residues[shard] for shard in made) / seconds if timed else None
        oom_splits = sum(splits[shard] for shard in commit["shards"] if shard in splits)
        rows.append({**commit, "residues_per_second": rate, "oom_splits": int(oom_splits)})
    return rows


def _versions(commits: list[dict]) -> dict[str, str]:
    """The versions that made this store's shards; more than one where jobs differ."""
    found: dict[str, dict[str, None]] = {"report": {f"lengthwise {__version__}": None}}
    for commit in commits:
        for name, version in commit["versions"].items():
            if version is not None:
                found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _write_tsv(table: pa.Table, path: Path) -> None:
    with atomic(path) as part:
        duckdb.from_arrow(table).write_csv(
            str(part), sep="\t", header=True
        )  # pandas would take a minute per million rows


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["n"] = "{:,.0f}".format
    environment.filters["plural"] = lambda n, one, many=None: f"{n:,} {one if n == 1 else many or one + 's'}"
    return environment.get_template("report.html")
