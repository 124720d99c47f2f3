"""The run summary: the last lines of a run say what was made and where it is, or why the run failed."""

import json
import shlex
from pathlib import Path

from lengthwise.system.files import read_json
from lengthwise.system.logging import ERROR_PREFIX
from lengthwise.system.text import count


def success_lines_of(
    store: Path, datasets: list[str], job_records: list[str], since: float, seconds: float
) -> list[str]:
    """Summarize a finished run.

    Parameters
    ----------
    store
        The store.
    datasets
        Names of the configured datasets.
    job_records
        Paths of the job records of the plan.
    since
        Start of the run, seconds of the epoch.
    seconds
        Duration of the run.

    Returns
    -------
    The lines, with a warning about random weights as the last; none unless every dataset is complete.
    """
    paths = [store / "datasets" / name / "manifest.json" for name in datasets]
    if not all(path.exists() for path in paths):
        return []  # the run was asked for single files only
    manifests = [read_json(path) for path in paths]
    total = {key: sum(m[key] for m in manifests) for key in ("records", "accepted", "duplicate", "rejected")}
    folder = f"{store}/datasets/" + (datasets[0] if len(datasets) == 1 else "")
    rejected = f"; why: {folder}{'/' if len(datasets) == 1 else '*/'}rejected.tsv" if total["rejected"] else ""
    lines = [
        "",
        f"Records     {total['records']:,} = {total['accepted']:,} accepted + {total['duplicate']:,} duplicate"
        f" + {total['rejected']:,} rejected{rejected}",
        f"Embeddings  {folder}",
        f"Time        {seconds:.0f} s; {_embedded_text(job_records, since)}",
        *([f"Report      {page}"] if (page := store / "report" / "index.html").exists() else []),
        f"Next        {_command_that_reads(store, dict(zip(datasets, manifests, strict=True)))}",
    ]
    if any(manifest["random_weights"] for manifest in manifests):
        lines.append(
            f"RANDOM WEIGHTS: the model {manifests[0]['model']!r} is a stand-in; these embeddings mean nothing."
            " Set 'model' in config/config.yaml for real ones"
        )
    return lines


def _command_that_reads(store: Path, manifests: dict[str, dict]) -> str:
    """A command that prints an id and its embedding's shape; the records' reasons if all were rejected."""
    readable = [name for name, manifest in manifests.items() if manifest["accepted"]]
    dataset = (readable or list(manifests))[0]
    outputs = manifests[dataset]["settings"]["outputs"]
    if not readable:
        shown = 'print(ds.records[["id", "reason"]])'
    elif "residue" in outputs:
        shown = "print(ds.ids[0], ds[0].shape)"
    else:
        shown = f'print(ds.ids[0], ds[:1].pooled("{outputs[0]}")[0].shape)'
    folder = json.dumps(f"{store}/datasets/{dataset}", ensure_ascii=False)
    return f"python -c {shlex.quote(f'import lengthwise; ds = lengthwise.open({folder}); {shown}')}"


def forecast_lines_of(store: Path, since: float) -> list[str]:
    """The forecast's text, if the run that began at `since` (seconds of the epoch) made one."""
    forecast = store / "forecast" / "forecast.txt"
    if not forecast.exists() or forecast.stat().st_mtime < since:
        return []
    return ["", *forecast.read_text(encoding="utf-8").splitlines()]


def failure_lines_of(store: Path, since: float) -> list[str]:
    """The reasons of failure in the logs since `since` (seconds of the epoch), and what to do next."""
    reasons = []
    for log in sorted((store / "logs").rglob("*.log")):
        if log.stat().st_mtime >= since:
            reasons += [line for line in log.read_text(errors="replace").splitlines() if line.startswith(ERROR_PREFIX)]
    if reasons:
        return ["", *dict.fromkeys(reasons), "Finished work is kept: mend that, then run the same command again."]
    return [
        "",
        "The run stopped before its end; Snakemake's lines above say why.",
        "Finished work is kept: run the same command again to go on.",
    ]


def _embedded_text(job_records: list[str], since: float) -> str:
    """Residues that this run embedded, and their rate."""
    paths = [path for path in map(Path, job_records) if path.exists() and path.stat().st_mtime >= since]
    new = [read_json(path) for path in paths]
    residues, seconds = (sum(job_record[key] for job_record in new) for key in ("made_residues", "embed_seconds"))
    if not residues:
        return "nothing was left to embed"
    return f"{residues:,} residues embedded in {count(len(new), 'job')}, {residues / seconds:,.0f} residues/s"
