"""Summarize: write the report's tables, figures and page. Captions of figures are in page.html."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import TRAINED_RESIDUES
from lengthwise.ingest.judge import TRUNCATED
from lengthwise.plan.planner import read_jobs
from lengthwise.report import figures, tables
from lengthwise.report.histogram import histogram
from lengthwise.report.map_figure import embedding_map
from lengthwise.report.pca import Projection, project
from lengthwise.report.proteins import Proteins, count_proteins
from lengthwise.report.study.facts import study_facts, why_skipped
from lengthwise.report.study.fits import Fit, as_table, fit_all
from lengthwise.report.study.schema import SCALING, no_study, read_scaling
from lengthwise.report.svg import Plot, save
from lengthwise.report.words import REASONS, measures_in_words
from lengthwise.store.metrics import find_undamaged, read_encoded
from lengthwise.store.paths import job_record_path, quarantined
from lengthwise.store.receipts import write_receipt
from lengthwise.store.settings import require, shape_of
from lengthwise.system.files import atomic, read_json, writing

log = logging.getLogger("lengthwise")
STUDY_FIGURES = ("scaling_memory", "no_grad", "half_precision", "copies", "scaling_throughput", "scaling_time")
PRODUCTION_FIGURES = ("throughput", "memory", "time")
FIGURES = ("lengths", *PRODUCTION_FIGURES, *STUDY_FIGURES, "map")
STUDY_OFF = "The scaling study is off; with scaling: true in the config, the next run measures it."
SHOWN = 25  # rows of a table on the page; its file has all rows
NO_MEMORY_OF_A_CPU = (
    "Memory against length is not shown for batches on a CPU: the process holds what earlier, larger batches freed, so its memory"
    " says nothing of a length. The scaling study measures it, pass by pass."
)


def summarize(
    store: Path, jobs_tsv: Path, datasets: dict[str, Path], scaling: Path | None, out: Path, windows: Path | None = None
) -> dict:
    """Write the report of a store.

    Parameters
    ----------
    store
        The store, with a job record for every job of `jobs_tsv`.
    jobs_tsv
        The table that `lengthwise.plan.planner.plan` wrote.
    datasets
        {dataset: its manifest.json}, the index beside it.
    scaling
        The table that `lengthwise.report.study.measure.scaling` wrote; None leaves the study out of the report.
    out
        The folder for the tables (`lengthwise.report.tables.COLUMNS`) as TSV and Parquet, an SVG and a PNG of each of
        `FIGURES` (of one that cannot be drawn an SVG that says why), index.html, and last the receipt of these files.

    windows
        The table that `lengthwise.report.study.windows.measure_windows` wrote; None where no protein is in windows.

    Returns
    -------
    The facts of the page's headline: counts of datasets, records (accepted, duplicate, rejected, beyond the training length),
    distinct sequences of the datasets and their residues, jobs, what these hold (`held`), shards, batches, missing metrics and
    OOM splits; model, precision and random_weights; and `rates`, one for each device and precision that batches ran on.

    Raises
    ------
    LengthwiseError
        A job has no job record: it is not finished. Or the study's table is damaged.
    """
    settings = require(store)
    job_records = _read_job_records(store, jobs_tsv)
    shards = list(dict.fromkeys(shard for job_record in job_records for shard in job_record["shards"]))
    present = find_undamaged(store, shards, job_records)
    metrics = read_encoded(present)
    tables.write({"metrics": metrics}, out)
    batches = tables.batches(metrics, job_records)
    del metrics  # large where there are millions of batches
    bins, jobs, devices = tables.bin_by_length(batches), tables.jobs(job_records, batches), tables.devices(batches)
    kept = _kept_study(out / SCALING) if scaling is None else _measured_study(scaling)
    study = no_study() if scaling is None or kept is None else kept
    study_off = STUDY_OFF if scaling is None else why_skipped(study)
    found = fit_all(study)
    ledger = [read_json(manifest) | {"dataset": name} for name, manifest in datasets.items()]
    proteins = count_proteins(datasets, out / ".summarize.spill")
    projection, no_map = project(store, settings, datasets)
    no_records = pd.DataFrame(columns=list(tables.COLUMNS["map"]), dtype="string")
    written = {
        "by_length": bins.drop(columns="group"),
        "jobs": jobs,
        "devices": devices,
        "datasets": tables.datasets(ledger),
        "lengths": proteins.lengths,
        "laws": as_table(found),
        "map": projection.records if projection else no_records,
    }
    tables.write(written, out)
    compared = _compared_windows(windows, ledger, out) if windows else None
    tables.write_columns(out, [name for name in tables.COLUMNS if windows or name != "windows"])
    tables.write_parquet(study if kept is None else kept, out / "scaling.parquet")
    facts = _facts(settings, job_records, batches, devices, ledger, proteins)
    facts |= {"shards": len(shards), "missing_metrics": len(shards) - len(present)}
    shown = _figures(batches, bins, devices, study_off or study, found, projection or no_map, proteins, settings, out)
    page = _template().render(
        facts=facts,
        settings=settings,
        trained=TRAINED_RESIDUES,
        ledger=ledger[:SHOWN],
        proteins=proteins,
        by_dataset=proteins.by_dataset.head(SHOWN).to_dict("index"),
        policies=_policies(ledger),
        truncated=sum((row.get("changes") or {}).get(TRUNCATED, 0) for row in ledger),
        windows=compared,
        reason_words=REASONS,
        reasons=sum((Counter(row["reasons"]) for row in ledger), Counter()).most_common(),
        figures=shown,
        notes={"production": _notes(shown, PRODUCTION_FIGURES), "study": _notes(shown, STUDY_FIGURES)},
        measures=measures_in_words(batches),
        rest=_rest(batches),
        batches_shown=min(len(batches), figures.MAX_POINTS),
        study=study_facts(study, found, settings),
        study_off=study_off,
        map_of=projection.of if projection else "",
        map_by_umap=projection is not None and bool(projection.records["umap1"].notna().all()),
        map_records=len(projection.records) if projection else 0,
        jobs=jobs.sort_values("residues_per_second", kind="stable").head(SHOWN).to_dict("records"),
        devices=devices.to_dict("records"),
        parity=_parity(store),
        versions=_versions(job_records),
        columns={
            name: text
            for name, text in tables.COLUMNS.items()
            if (scaling or name != "scaling") and (windows or name != "windows")
        },
        names={engine: name for engine, (name, *_) in figures.ENGINES.items()},
    )
    with atomic(out / "index.html") as part:
        part.write_text(page, encoding="utf-8")
    others = [windows.name, "windows.parquet"] if windows else []
    write_receipt(out, [*_written_files(written, kept, out), *others], datasets=list(datasets))
    return facts


def _measured_study(scaling: Path) -> pd.DataFrame:
    """The study; a damaged one is put into quarantine, so that the next run measures it again."""
    try:
        return read_scaling(scaling)
    except LengthwiseError as error:
        with writing(scaling):
            scaling.rename(quarantined(scaling))
        raise LengthwiseError(f"{error}; it is in quarantine: run snakemake again, which measures it again") from error


def _kept_study(scaling: Path) -> pd.DataFrame | None:
    """The study of an earlier run, for its Parquet copy; None if there is none, or a damaged one."""
    try:
        return read_scaling(scaling)
    except FileNotFoundError:
        return None
    except LengthwiseError as error:
        log.warning("%s; it is left out", error)
        return None


def _written_files(written: Iterable[str], kept: pd.DataFrame | None, out: Path) -> list[str]:
    """The files of the report."""
    names = [f"{table}.{ending}" for table in ("metrics", *written) for ending in ("tsv", "parquet")]
    names += ["columns.tsv", "scaling.parquet", "index.html", *([] if kept is None else [SCALING])]
    names += [f"{figure}.{ending}" for figure in FIGURES for ending in ("svg", "png")]
    return [name for name in names if (out / name).exists()]


def _read_job_records(store: Path, jobs_tsv: Path) -> list[dict]:
    job_records = []
    for job in read_jobs(jobs_tsv)["job"]:
        path = job_record_path(store, job)
        if not path.exists():
            raise LengthwiseError(f"{path} is missing: the job is not finished; run snakemake to finish it")
        job_records.append(read_json(path))
    return job_records


def _policies(ledger: list[dict]) -> list[int]:
    """Lengths beyond which datasets reject records; earlier versions did not write their policy down."""
    policies = [row.get("policy") or {} for row in ledger]
    return sorted({policy["max_residues"] for policy in policies if policy.get("long_policy") == "skip"})


def _compared_windows(table: Path, ledger: list[dict], out: Path) -> dict:
    """Proteins in windows beside whole ones: the sample's rows, medians, the windows' sizes. Copies the table to Parquet."""
    try:
        compared = pd.read_csv(table, sep="\t")
        rows = compared.sort_values("deviation", ascending=False).head(SHOWN).to_dict("records")
    except (ValueError, KeyError, OSError) as error:
        raise LengthwiseError(f"{table}: damaged; remove it and run snakemake again") from error
    tables.write_parquet(compared, out / "windows.parquet")
    policy = next(row["policy"] for row in ledger)
    medians = compared[["deviation", "mean_deviation"]].median().to_dict()
    return {"rows": rows, "n": len(compared), **medians, **{key: policy[key] for key in ("window_residues", "overlap")}}


def _notes(shown: dict[str, dict], names: Iterable[str]) -> list[str]:
    """Why figures are missing, each reason once; that a CPU copies nothing needs no words."""
    reasons = [shown[name].get("reason") for name in names]
    return [reason for reason in dict.fromkeys(reasons) if reason and reason != figures.NO_COPIES]


def _facts(
    settings: dict,
    job_records: list[dict],
    batches: pd.DataFrame,
    devices: pd.DataFrame,
    ledger: list[dict],
    proteins: Proteins,
) -> dict:
    counts = {key: sum(row[key] for row in ledger) for key in ("records", "accepted", "duplicate", "rejected")}
    limited = batches["most_tokens"].notna()
    return {
        "model": settings["model"],
        "precision": settings["precision"],
        "random_weights": settings["random_weights"],
        "datasets": len(ledger),
        **counts,
        "accounted": all(row["records"] == row["accepted"] + row["duplicate"] + row["rejected"] for row in ledger),
        "beyond_training": int(proteins.by_dataset["beyond_training"].sum()),
        "sequences": proteins.sequences,
        "residues": proteins.residues,
        "held": sum(job_record["sequences"] for job_record in job_records),
        "jobs": len(job_records),
        "batches": len(batches),
        "oom_splits": int(batches["oom_splits"].sum()),
        "fill": float(batches["n_tokens"][limited].sum() / batches["most_tokens"].sum()) if limited.any() else None,
        "rates": devices[["device", "precision", "batches", "residues_per_second"]].to_dict("records"),
    }


def _figures(
    batches: pd.DataFrame,
    bins: pd.DataFrame,
    devices: pd.DataFrame,
    study: pd.DataFrame | str,
    found: list[Fit],
    projection: Projection | str,
    proteins: Proteins,
    settings: dict,
    out: Path,
) -> dict[str, dict]:
    """Write the figures; {name: {"svg": element}, or {"reason": why there is none}}."""
    allocated = batches["memory_measure"] == "allocated"
    none = "No batch of these jobs has metrics, so there is nothing to show of production."
    memory: Plot | str
    if allocated.any():
        on_gpu = bins[bins["memory_measure"] == "allocated"]
        memory = figures.production(batches[allocated], on_gpu, "peak_bytes", "Peak allocated GPU memory")
    else:
        on_cpu = len(batches) and batches["gpu_busy"].isna().all()
        memory = NO_MEMORY_OF_A_CPU if on_cpu else none if not len(batches) else "Peak memory was not measured."
    drawn: dict[str, Plot | str] = {
        "lengths": histogram(proteins.lengths),
        "throughput": figures.production(batches, bins, "residues_per_second", "Residues per second")
        if len(batches)
        else none,
        "memory": memory,
        "time": figures.time_shares(devices, _rest(batches)) if len(batches) else none,
        **(dict.fromkeys(STUDY_FIGURES, study) if isinstance(study, str) else _study_figures(study, found, settings)),
        "map": projection if isinstance(projection, str) else embedding_map(projection),
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


def _study_figures(study: pd.DataFrame, found: list[Fit], settings: dict) -> dict[str, Plot | str]:
    """Plots of the scaling study, or why there is none."""
    config = shape_of(settings)
    # The store's own precision, except in the figure that compares precisions.
    own = study[study["precision"] == settings["precision"]]
    plain, added = own[~own["gradients"]], " or ".join(measures_in_words(study[study["peak_bytes"].notna()]))
    return {
        "scaling_memory": figures.scaling_memory(plain, found, config, added),
        "no_grad": figures.no_grad(own, added),
        "half_precision": figures.half_precision(study),
        "copies": figures.copies(study),
        "scaling_throughput": figures.scaling_throughput(plain),
        "scaling_time": figures.scaling_time(plain, found, config),
    }


def _rest(batches: pd.DataFrame) -> str:
    """Name of the time without computing or waiting: copies on a GPU, idle cores on a CPU."""
    on_cpu = batches["gpu_busy"].isna()
    what = "idle cores" if on_cpu.all() else "copies, idle cores" if on_cpu.any() else "copies"
    return f"{what}, and the rest"


def _parity(store: Path) -> list[dict]:
    """The undamaged parity receipts, one for each device and set of versions; earlier versions wrote other ones."""
    found = []
    for path in sorted((store / "parity").glob("*.json")):
        try:
            receipt = read_json(path, "device", "versions", "parity")
        except LengthwiseError as error:
            log.warning("%s; it is left out", error)
        else:
            found += [receipt] if "stored" in receipt["parity"] else []
    return found


def _versions(job_records: list[dict]) -> dict[str, str]:
    """{package: versions of the jobs}; several where jobs differ."""
    found: dict[str, dict[str, None]] = {"report": {f"lengthwise {__version__}": None}}
    for job_record in job_records:
        for name, version in job_record["versions"].items():
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
    return environment.get_template("page.html")
