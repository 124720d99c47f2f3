"""Measure time and memory against sequence length on this device."""

from pathlib import Path

from lengthwise.logs import reporting

with reporting(snakemake.log[0], snakemake.scriptdir):
    from lengthwise.files import read_json
    from lengthwise.scaling import scaling

    settings = read_json(Path(snakemake.params.store) / "settings.json")
    receipt = read_json(Path(snakemake.input.weights))
    scaling(
        Path(receipt["path"]),
        settings["device"] if snakemake.config["device"] == "auto" else snakemake.config["device"],
        settings["precision"],
        Path(snakemake.output.table),
        threads=snakemake.threads,
    )
