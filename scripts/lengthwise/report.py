"""Report: batch metrics, ledgers and the scaling study, as tables, figures and one page."""

from collections import Counter
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from lengthwise import figures, tables
from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.files import atomic, read_json
from lengthwise.laws import (
    LEAST_POINTS,
    LEAST_R_SQUARED,
    MEMORY_MARGIN,
    Law,
    as_table,
    choose,
    crossing,
    laws,
    longest,
    longest_table,
)
from lengthwise.metrics import read_encoded
from lengthwise.plan import read_jobs
from lengthwise.projection import Projection, project
from lengthwise.scaling_table import FAIR_ESM, LENGTHWISE, OK, SERIES, read_scaling
from lengthwise.settings import require
from lengthwise.shapes import ModelConfig
from lengthwise.store import commit_path, find_metrics
from lengthwise.svg import save

MEASURES = {"allocated": "allocated GPU memory", "resident": "resident memory"}
STATUS_WORDS = {
    "skipped_time": "no time left",
    "skipped_memory": "would not have fitted in memory",
    "out_of_memory": "out of memory",
}
FIGURES = (
    "throughput",
    "memory",
    "time",
    "fill",
    "scaling_memory",
    "no_grad",
    "half_precision",
    "copies",
    "scaling_throughput",
    "scaling_time",
    "map",
)
SHOWN = 25  # rows of a long table: the files have them all
SLOWEST = 10
SHORT, LONG = 50, 500  # the lengths of the first question


def summarize(store: Path, jobs_tsv: Path, datasets: dict[str, Path], scaling: Path, out: Path) -> dict:
    """Write the report of a store.

    Parameters
    ----------
    store
        The store; every job of `jobs_tsv` is committed in it.
    jobs_tsv
        The table that `lengthwise.plan.plan` wrote.
    datasets
        {dataset: its manifest.json}, the index beside it.
    scaling
        The table that `lengthwise.scaling.scaling` wrote.
    out
        The folder for the tables (`lengthwise.tables.COLUMNS`) as TSV and Parquet, an SVG and a PNG of each of
        `FIGURES` (of one that cannot be drawn an SVG that says why), and index.html, which is last.

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
    metrics = read_encoded(present)
    tables.write({"metrics": metrics}, out)
    batches = tables.batches(metrics, commits)
    del metrics  # of millions of batches it is large
    bins, jobs, devices = tables.bin_by_length(batches), tables.jobs(commits, batches), tables.devices(batches)
    study = read_scaling(scaling)
    found = laws(study)
    ledger = [read_json(manifest) | {"dataset": name} for name, manifest in datasets.items()]
    projection, no_map = project(store, settings, datasets)
    written = {
        "by_length": bins.drop(columns="group"),
        "jobs": jobs,
        "devices": devices,
        "datasets": tables.datasets(ledger),
        "laws": as_table(found),
        "map": projection.records if projection else pd.DataFrame(columns=list(tables.COLUMNS["map"]), dtype="string"),
    }
    tables.write(written, out)
    tables.write_columns(out)
    tables.write_parquet(study, out / "scaling.parquet")
    facts = _facts(settings, commits, batches, devices, ledger)
    facts |= {"shards": len(shards), "missing_metrics": len(shards) - len(present)}
    page = _template().render(
        facts=facts,
        settings=settings,
        ledger=ledger[:SHOWN],
        reasons=sum((Counter(row["reasons"]) for row in ledger), Counter()).most_common(),
        figures=_figures(batches, bins, devices, study, found, projection or no_map, settings, out),
        measures=_measures(batches),
        rest=_rest(batches),
        slow=tables.SLOW,
        batches_shown=min(len(batches), figures.MAX_POINTS),
        study=_study_facts(study, found, settings),
        map_of=projection.of if projection else "",
        map_records=len(projection.records) if projection else 0,
        jobs=jobs.sort_values("residues_per_second", kind="stable").head(SHOWN).to_dict("records"),
        devices=devices.to_dict("records"),
        slowest=tables.slowest(batches, bins, SLOWEST).to_dict("records"),
        parity=_parity(store),
        versions=_versions(commits),
        columns=tables.COLUMNS,
        names={engine: name for engine, (name, *_) in figures.ENGINES.items()},
    )
    with atomic(out / "index.html") as part:
        part.write_text(page, encoding="utf-8")
    return facts


def _read_commits(store: Path, jobs_tsv: Path) -> list[dict]:
    commits = []
    for job in read_jobs(jobs_tsv)["job"]:
        path = commit_path(store, job)
        if not path.exists():
            raise LengthwiseError(f"{path} is missing: the job is not finished; run snakemake to finish it")
        commits.append(read_json(path))
    return commits


def _facts(
    settings: dict, commits: list[dict], batches: pd.DataFrame, devices: pd.DataFrame, ledger: list[dict]
) -> dict:
    counts = {key: sum(row[key] for row in ledger) for key in ("records", "accepted", "duplicate", "rejected")}
    tokens = batches["n_tokens"].sum()
    padded = (batches["n_sequences"] * (batches["max_length"] + 2)).sum()
    limited = batches["most_tokens"].notna()
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
        "padding": int(tokens - (batches["n_residues"] + 2 * batches["n_sequences"]).sum()),
        "padding_saved": float(padded / tokens - 1) if tokens else None,
        "fill": float(batches["n_tokens"][limited].sum() / batches["most_tokens"].sum()) if limited.any() else None,
        "rates": devices[["device", "precision", "batches", "residues_per_second"]].to_dict("records"),
    }


def _figures(
    batches: pd.DataFrame,
    bins: pd.DataFrame,
    devices: pd.DataFrame,
    study: pd.DataFrame,
    found: list[Law],
    projection: Projection | str,
    settings: dict,
    out: Path,
) -> dict[str, dict]:
    """Write the figures; {name: {"svg": element}, or {"reason": why there is none}}."""
    config, measures = _shape(settings), _measures(batches)
    # The store's own precision, but for the figure that compares them.
    own = study[study["precision"] == settings["precision"]]
    plain, added = own[~own["gradients"]], " or ".join(_measures(study[study["peak_bytes"].notna()]))
    none = "No batch of these jobs has metrics, so there is nothing to show of production."
    label = f"Peak {measures[0]}" if len(measures) == 1 else "Peak memory"
    drawn = {
        "throughput": figures.production(batches, bins, "residues_per_second", "Residues per second")
        if len(batches)
        else none,
        "memory": figures.production(_with_measure(batches), _with_measure(bins), "peak_bytes", label)
        if measures
        else "Peak memory of production batches was not measured, so there is no figure of it.",
        "time": figures.time_shares(devices, _rest(batches)) if len(batches) else none,
        "fill": figures.production(batches, bins, "fill", "Tokens of the batch, of the most allowed", medians=False)
        if batches["fill"].notna().any()
        else none,
        "scaling_memory": figures.scaling_memory(plain, found, config, added),
        "no_grad": figures.no_grad(own, added),
        "half_precision": figures.half_precision(study),
        "copies": figures.copies(study),
        "scaling_throughput": figures.scaling_throughput(plain),
        "scaling_time": figures.scaling_time(plain, found, config),
        "map": projection if isinstance(projection, str) else figures.embedding_map(projection),
    }
    shown = {}
    for name, plot in drawn.items():
        if isinstance(plot, str):
            save(
                figures.note(plot), out, name
            )  # for Snakemake's report, which has every figure; the page says it in words
            (out / f"{name}.png").unlink(missing_ok=True)  # a paper needs no picture of a sentence
            shown[name] = {"reason": plot}
        else:
            shown[name] = {"svg": Markup(save(plot, out, name))}
    return shown


def _shape(settings: dict) -> ModelConfig:
    return ModelConfig(settings["num_layers"], settings["embed_dim"], settings["attention_heads"])


def _measures(rows: pd.DataFrame) -> list[str]:
    """How memory was measured, in words."""
    return [MEASURES[name] for name in sorted(rows["memory_measure"].dropna().unique())]


def _rest(batches: pd.DataFrame) -> str:
    """What of the time was neither computing nor waiting: only a GPU is copied to, only a CPU has cores without a batch."""
    on_cpu = batches["gpu_busy"].isna()
    what = "idle cores" if on_cpu.all() else "copies, idle cores" if on_cpu.any() else "copies"
    return f"{what}, and the rest"


def _with_measure(table: pd.DataFrame) -> pd.DataFrame:
    """Groups that say how memory was measured, where measures differ."""
    if table["memory_measure"].nunique() < 2:
        return table
    measure = table["memory_measure"].astype(object).map(MEASURES).fillna("not measured")
    return table.assign(group=table["group"].astype(object) + ", " + measure)


def _study_facts(study: pd.DataFrame, found: list[Law], settings: dict) -> dict:
    """What the page says of the scaling study."""
    sized, config, precision = study[study["peak_bytes"].notna()], _shape(settings), settings["precision"]
    itemsize = 4 if precision == "float32" else 2
    row = study.iloc[0] if len(study) else None
    device_bytes = None if row is None or pd.isna(row["device_bytes"]) else int(row["device_bytes"])
    times = {engine: choose(found, "time", engine, precision) for engine in (LENGTHWISE, FAIR_ESM)}
    sizes = {engine: choose(found, "memory", engine, precision) for engine in (LENGTHWISE, FAIR_ESM)}
    reach = {}
    if device_bytes is not None:
        free = MEMORY_MARGIN * device_bytes - config.parameters * itemsize
        reach = {engine: longest(law, free) for engine, law in sizes.items() if law}
    table = longest_table(device_bytes, itemsize)
    clocks, warmth = study["clock_mhz"].dropna(), study["temperature_c"].dropna()
    return {
        "device": "no device" if row is None else row["device"],
        "device_bytes": device_bytes and figures.bytes_text(device_bytes),
        "measures": _measures(sized),
        "ratios": _ratios(sized[sized["precision"] == precision]),
        "precisions": _precisions(study),
        "copies": _copies(study),
        "stops": _stops(study),
        "laws": found,
        "least_points": LEAST_POINTS,
        "least_r_squared": LEAST_R_SQUARED,
        "equal_by_formula": 6 * config.embed_dim - 2,
        "equal": {engine: (crossing(law, config), law.up_to) for engine, law in times.items() if law},
        "reach": reach,
        "longest": {"columns": list(table.columns[1:]), "rows": table.to_dict("records")},
        "clock": _range(clocks),
        "temperature": _range(warmth),
    }


def _range(values: pd.Series) -> str:
    """From the least to the most, or the one where they read alike; empty if there is none."""
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in (values.min(), values.max()))) if len(values) else ""


def _ratios(sized: pd.DataFrame) -> list[dict]:
    """What the memory of one sequence does between the two lengths, for each engine and mode."""
    single = sized[sized["batch_tokens"].isna()].set_index(["engine", "gradients", "length"])["peak_bytes"]
    ratios = []
    for engine in (LENGTHWISE, FAIR_ESM):
        for gradients in (False, True):
            short, long = (single.get((engine, gradients, length)) for length in (SHORT, LONG))
            if short and long:
                row = {"engine": engine, "gradients": gradients, "ratio": long / short, "bytes": int(long)}
                ratios.append(row | {"short": figures.bytes_text(short), "long": figures.bytes_text(long)})
    return ratios


def _precisions(study: pd.DataFrame) -> list[dict]:
    """Weights, memory and speed of Lengthwise's full batches in each precision, at the longest length that all reached."""
    rows = study[(study["engine"] == LENGTHWISE) & ~study["gradients"] & study["wall_ms"].notna()]
    rows = rows[(rows["batch_tokens"] == rows["batch_tokens"].max()).fillna(False).astype(bool)]
    reached = rows.groupby("length")["precision"].nunique()
    common = reached[reached == rows["precision"].nunique()].index
    if not len(common):
        return []
    rows = rows[rows["length"] == common.max()]
    bytes_text = figures.bytes_text
    return [
        {
            "precision": row.precision,
            "length": row.length,
            "weights": None if pd.isna(row.weights_bytes) else bytes_text(row.weights_bytes),
            "peak": None if pd.isna(row.peak_bytes) else bytes_text(row.peak_bytes),
            "residues_per_second": row.residues_per_second,
        }
        for row in rows.itertuples()
    ]


def _copies(study: pd.DataFrame) -> float | None:
    """The copies' largest share of the pass that they go with, in full batches; None where nothing is copied."""
    rows = study[study["copy_out_ms"].notna() & study["batch_tokens"].notna()]
    return float(((rows["copy_in_ms"] + rows["copy_out_ms"]) / rows["wall_ms"]).max()) if len(rows) else None


def _stops(study: pd.DataFrame) -> list[str]:
    """Where series of the scaling study ended early, and why."""
    first = (
        study[study["status"] != OK]
        .sort_values("length", kind="stable")
        .groupby(SERIES, dropna=False, sort=False)
        .head(1)
    )
    return [
        f"{row.engine}, {row.precision}, {'with' if row.gradients else 'without'} gradients, "
        f"{'one at a time' if pd.isna(row.batch_tokens) else f'batches of {row.batch_tokens:,} tokens'}: "
        f"from {row.length:,} residues on ({STATUS_WORDS[row.status]})"
        for row in first.itertuples()
    ]


def _parity(store: Path) -> list[dict]:
    """The receipts of comparisons with fair-esm, one for each device and versions."""
    return [read_json(path, "device", "versions", "parity") for path in sorted((store / "parity").glob("*.json"))]


def _versions(commits: list[dict]) -> dict[str, str]:
    """The versions that made this store's shards; more than one where jobs differ."""
    found: dict[str, dict[str, None]] = {"report": {f"lengthwise {__version__}": None}}
    for commit in commits:
        for name, version in commit["versions"].items():
            if version is not None:
                found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["n"] = "{:,.0f}".format
    environment.filters["percent"] = lambda share: "" if pd.isna(share) else f"{100 * share:.1f}"
    environment.filters["bytes"] = lambda count: "" if pd.isna(count) else figures.bytes_text(count)
    environment.filters["some"] = lambda value: None if pd.isna(value) else value
    environment.filters["plural"] = lambda n, one, many=None: f"{n:,} {one if n == 1 else many or one + 's'}"
    return environment.get_template("report.html")
