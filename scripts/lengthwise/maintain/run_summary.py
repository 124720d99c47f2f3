"""A run's last lines: what was done and where it is, or why it failed."""

import json
import shlex
from pathlib import Path

from lengthwise.system.files import read_json
from lengthwise.system.logging import FAILED
from lengthwise.system.text import count


def success_lines_of(
    store: Path, datasets: list[str], job_records: list[str], since: float, seconds: float
) -> list[str]:
    """What a finished run did, in five lines, and a warning of random weights as the last.

    Parameters
    ----------
    store
        The store.
    datasets
        Names of the configured datasets.
    commits
        Paths of the commits of all jobs that they stand on.
    since
        When the run began, in seconds of the epoch.
    seconds
        How long it took.
    """
    paths = [store / "datasets" / name / "manifest.json" for name in datasets]
    if not all(path.exists() for path in paths):
        return []  # something less than whole datasets was asked for
    manifests = [read_json(path) for path in paths]
    total = {key: sum(m[key] for m in manifests) for key in ("records", "accepted", "duplicate", "rejected")}
    here = f"{store}/datasets/" + (datasets[0] if len(datasets) == 1 else "")
    rejected = f"; why: {here}{'/' if len(datasets) == 1 else '*/'}rejected.tsv" if total["rejected"] else ""
    first = json.dumps(f"{store}/datasets/{datasets[0]}", ensure_ascii=False)
    lines = [
        "",
        f"Records     {total['records']:,} = {total['accepted']:,} accepted + {total['duplicate']:,} duplicate"
        f" + {total['rejected']:,} rejected{rejected}",
        f"Embeddings  {here}",
        f"Time        {seconds:.0f} s; {_made(job_records, since)}",
        *([f"Report      {page}"] if (page := store / "report" / "index.html").exists() else []),
        f"Next        python -c {shlex.quote(f'import lengthwise; print(lengthwise.open({first}).records)')}",
    ]
    if any(manifest["random_weights"] for manifest in manifests):
        lines.append(
            f"RANDOM WEIGHTS: the model {manifests[0]['model']!r} is a stand-in; these embeddings mean nothing."
            " Set 'model' in config/config.yaml for real ones"
        )
    return lines


def forecast_lines_of(store: Path, since: float) -> list[str]:
    """The forecast, if one was made since a time (seconds of the epoch)."""
    made = store / "forecast" / "forecast.txt"
    if not made.exists() or made.stat().st_mtime < since:
        return []
    return ["", *made.read_text(encoding="utf-8").splitlines()]


def failure_lines_of(store: Path, since: float) -> list[str]:
    """The reasons that rules wrote into their logs since a time (seconds of the epoch)."""
    reasons = []
    for log in sorted((store / "logs").rglob("*.log")):
        if log.stat().st_mtime >= since:
            reasons += [line for line in log.read_text(errors="replace").splitlines() if line.startswith(FAILED)]
    if reasons:
        return ["", *dict.fromkeys(reasons), "What is finished is kept: mend that, then run the same command again."]
    return [
        "",
        "The run stopped before its end; Snakemake's lines above say why.",
        "What is finished is kept: run the same command again to go on.",
    ]


def _made(job_records: list[str], since: float) -> str:
    """What this run's jobs embedded, and how fast."""
    made = [
        read_json(Path(path)) for path in job_records if Path(path).exists() and Path(path).stat().st_mtime >= since
    ]
    residues, seconds = (sum(job_record[key] for job_record in made) for key in ("made_residues", "embed_seconds"))
    if not residues:
        return "nothing was left to embed"
    return f"{residues:,} residues embedded in {count(len(made), 'job')}, {residues / seconds:,.0f} residues/s"
