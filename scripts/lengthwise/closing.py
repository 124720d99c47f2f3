"""A run's last lines: what was done and where it is, or why it failed."""

from pathlib import Path

from lengthwise.files import read_json
from lengthwise.logs import FAILED


def success_lines_of(store: Path, datasets: list[str], seconds: float) -> list[str]:
    """What a finished run did; the last line warns of random weights."""
    paths = [store / "datasets" / name / "manifest.json" for name in datasets]
    if not all(path.exists() for path in paths):
        return []  # something less than a whole dataset was asked for
    manifests = [read_json(path) for path in paths]
    total = {
        key: sum(m[key] for m in manifests) for key in ("records", "accepted", "duplicate", "rejected", "residues")
    }
    lines = [
        "",
        f"Records     {total['records']:,} = {total['accepted']:,} accepted + {total['duplicate']:,} duplicate"
        f" + {total['rejected']:,} rejected, in {len(manifests)} dataset{'s' * (len(manifests) != 1)};"
        f" {total['residues']:,} residues",
        f"Embeddings  {store}/datasets/" + (datasets[0] if len(datasets) == 1 else ""),
        f"Report      {store}/report/index.html",
        f"Time        {seconds:.0f} s",
        f'Read them   lengthwise.open("{store}/datasets/{datasets[0]}")',
    ]
    if any(manifest["random_weights"] for manifest in manifests):
        lines.append(
            f"RANDOM WEIGHTS: the model {manifests[0]['model']!r} is a stand-in; these embeddings mean nothing."
            " Set 'model' in config/config.yaml for real ones"
        )
    return lines


def failure_lines_of(store: Path, since: float) -> list[str]:
    """The reasons that rules wrote into their logs since a time (seconds of the epoch)."""
    reasons = []
    for log in sorted((store / "logs").rglob("*.log")):
        if log.stat().st_mtime >= since:
            reasons += [line for line in log.read_text(errors="replace").splitlines() if line.startswith(FAILED)]
    if not reasons:
        return ["", "The run failed; Snakemake's lines above say where. Run the same command again to go on."]
    return ["", *dict.fromkeys(reasons)]
