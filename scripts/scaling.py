"""Measure time and memory against sequence length on this device."""

from pathlib import Path

from lengthwise.logs import reporting

with reporting(snakemake.log[0], snakemake.scriptdir):
    from lengthwise.scaling import scaling
    from lengthwise.settings import require
    from lengthwise.weights import location

    store = Path(snakemake.params.store)
    settings = require(store)
    scaling(
        location(store)[0],
        settings["device"] if snakemake.config["device"] == "auto" else snakemake.config["device"],
        settings["precision"],
        Path(snakemake.output.table),
        threads=snakemake.threads,
    )
