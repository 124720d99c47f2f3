"""Compare proteins stored in windows with what they are whole, for a sample."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import reporting

with reporting(snakemake.log[0]):
    from lengthwise.store.settings import device_of
    from lengthwise.system.gpus import leased

    store = Path(snakemake.params.store)
    device = device_of(store, snakemake.config["device"])
    with leased(device):
        from lengthwise.report.study.windows import measure_windows

        measure_windows(
            store,
            dict(zip(snakemake.params.datasets, map(Path, snakemake.input.manifests), strict=True)),
            device,
            Path(snakemake.output.table),
            threads=snakemake.threads,
            residency=snakemake.config["residency"],
        )
