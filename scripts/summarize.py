"""Turn batch metrics and the scaling study into tables, figures and a page."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import reporting

with reporting(snakemake.log[0]):
    from lengthwise.report.summarize import summarize

    manifests = dict(zip(snakemake.params.datasets, map(Path, snakemake.input.manifests), strict=True))
    summarize(
        Path(snakemake.params.store),
        Path(snakemake.input.jobs),
        manifests,
        Path(snakemake.input.scaling) if snakemake.input.scaling else None,
        Path(snakemake.output.page).parent,
        windows=Path(snakemake.input.windows) if snakemake.input.windows else None,
    )
