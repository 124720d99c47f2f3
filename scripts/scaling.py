"""Measure time and memory against sequence length on this device."""

from pathlib import Path

from lengthwise.system.logging import reporting

with reporting(snakemake.log[0]):
    from lengthwise.store.settings import device_of, require
    from lengthwise.store.weights import location
    from lengthwise.system.gpus import leased

    store = Path(snakemake.params.store)
    device = device_of(store, snakemake.config["device"])
    with leased(device):
        from lengthwise.report.study.measure import scaling

        scaling(
            location(store)[0],
            device,
            require(store)["precision"],
            Path(snakemake.output.table),
            threads=snakemake.threads,
            seconds=snakemake.config["scaling_seconds"],
        )
