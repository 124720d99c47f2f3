"""The run summary: the last lines of a run say what was made and where it is, or why the run failed."""

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from lengthwise.esm2.tensors import POOLED
from lengthwise.maintain.killed_jobs import Evidence, FailedJob, killed_job_lines
from lengthwise.plan.forecast_text import text
from lengthwise.system.files import read_json
from lengthwise.system.logging import ERROR_PREFIX, SIGTERM_LINE
from lengthwise.system.text import count


def working_folder(directory: str | Path | None) -> str:
    """The working folder, as the shell sees it in which a run was started.

    Parameters
    ----------
    directory
        The option with which Snakemake changed its working folder; None if it did not.

    Returns
    -------
    Empty if both are the same folder; a relative path if the working folder is inside of the shell's; else an absolute path.
    """
    if directory is None:
        return ""
    shell = os.environ.get("PWD", "")  # the shell's: changing the folder of a process leaves it as it is
    path = os.path.normpath(os.path.join(shell, directory))
    if not os.path.isabs(shell) or not os.path.isdir(path) or not os.path.samefile(path, os.curdir):
        return os.getcwd()
    relative = os.path.relpath(path, shell)
    if relative == os.curdir:
        return ""
    return path if relative.split(os.sep)[0] == os.pardir else relative


def success_lines_of(
    store: Path, datasets: list[str], job_records: list[str], since: float, seconds: float, folder: str = ""
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
    folder
        The working folder as the shell sees it, of `working_folder`.

    Returns
    -------
    The lines, with a warning about random weights as the last; none unless every dataset is complete.
    """
    paths = [store / "datasets" / name / "manifest.json" for name in datasets]
    if not all(path.exists() for path in paths):
        return []  # the run was asked for single files only
    manifests = [read_json(path) for path in paths]
    total = {key: sum(m[key] for m in manifests) for key in ("records", "accepted", "duplicate", "rejected")}
    shown = Path(folder, store)
    embeddings = f"{shown}/datasets/" + (datasets[0] if len(datasets) == 1 else "")
    rejected = f"; why: {embeddings}{'/' if len(datasets) == 1 else '*/'}rejected.tsv" if total["rejected"] else ""
    report = [f"Report      {shown / page}"] if (store / (page := Path("report", "index.html"))).exists() else []
    lines = [
        "",
        f"Records     {total['records']:,} = {total['accepted']:,} accepted + {total['duplicate']:,} duplicate"
        f" + {total['rejected']:,} rejected{rejected}",
        f"Embeddings  {embeddings}",
        f"Time        {seconds:.0f} s; {_embedded_text(job_records, since)}",
        *report,
        f"Next        {_command_that_reads(shown, dict(zip(datasets, manifests, strict=True)))}",
    ]
    if any(manifest["random_weights"] for manifest in manifests):
        lines.append(
            f"RANDOM WEIGHTS: the model {manifests[0]['model']!r} is a stand-in; these embeddings mean nothing."
            f" Set 'model' in {Path(folder, 'config/config.yaml')} for real ones"
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
        pooled = [output for output in outputs if output in POOLED]
        shown = f'print(ds.ids[0], ds[:1].pooled("{pooled[0]}")[0].shape)' if pooled else "print(ds.records)"
    folder = json.dumps(f"{store}/datasets/{dataset}", ensure_ascii=False)
    return f"python -c {shlex.quote(f'import lengthwise; ds = lengthwise.open({folder}); {shown}')}"


def forecast_lines_of(store: Path, since: float, folder: str = "") -> list[str]:
    """The forecast's text, if the run that began at `since` (seconds of the epoch) made one."""
    written_last = store / "forecast" / "forecast.txt"
    if not written_last.exists() or written_last.stat().st_mtime < since:
        return []
    made = read_json(store / "forecast" / "forecast.json")
    made["store"] = os.path.join(folder, made["store"])
    if download := made["disk"]["download"]:
        download["path"] = os.path.join(folder, download["path"])
    return ["", *text(made).splitlines()]


def failure_lines_of(
    store: Path, failed: list[FailedJob], evidence: Evidence, folder: str = "", names: Iterable[str] = ()
) -> list[str]:
    """Say why a run failed and what to do next: by the logs of its jobs, and of killed jobs by what else tells their end.

    Parameters
    ----------
    store
        The store.
    failed
        The jobs that failed for good.
    evidence
        Start of the run, and where to look for the end of killed jobs.
    folder
        The working folder as the shell sees it, of `working_folder`.
    names
        Other files and folders that the logs may name, relative to the working folder.
    """
    reasons: dict[Path, list[str]] = {}
    for log in sorted((store / "logs").rglob("*.log")):
        if log.stat().st_mtime >= evidence.since:
            lines = log.read_text(errors="replace").splitlines()
            reasons[log] = [line for line in lines if line.startswith(ERROR_PREFIX)]
    unexplained = [job for job in failed if not set(reasons.get(job.log, [])) - {SIGTERM_LINE}]
    for log, line in killed_job_lines(unexplained, evidence).items():
        reasons[log] = [line]
    if found := [line for of_a_log in reasons.values() for line in of_a_log]:
        lines = list(dict.fromkeys(_as_the_shell_sees_it(line, folder, [str(store), *names]) for line in found))
        return ["", *lines, "Finished work is kept: mend that, then run the same command again."]
    return [
        "",
        "The run stopped before its end; Snakemake's lines above say why.",
        "Finished work is kept: run the same command again to go on.",
    ]


def _as_the_shell_sees_it(line: str, folder: str, names: list[str]) -> str:
    """An error line with `folder` before these names, at its beginning or where they are folders of a path."""
    relative = sorted((name for name in names if not os.path.isabs(name)), key=len, reverse=True)
    if not folder or not relative:
        return line
    name = f"(?:{'|'.join(map(re.escape, relative))})"
    return re.sub(
        rf"(?<=^{ERROR_PREFIX}){name}(?=:)|(?<![\w./~-]){name}(?=/)", lambda found: os.path.join(folder, found[0]), line
    )


def _embedded_text(job_records: list[str], since: float) -> str:
    """Residues that this run embedded, and their rate."""
    paths = [path for path in map(Path, job_records) if path.exists() and path.stat().st_mtime >= since]
    new = [read_json(path) for path in paths]
    residues, seconds = (sum(job_record[key] for job_record in new) for key in ("made_residues", "embed_seconds"))
    if not residues:
        return "nothing was left to embed"
    return f"{residues:,} residues embedded in {count(len(new), 'job')}, {residues / seconds:,.0f} residues/s"
