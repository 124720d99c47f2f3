"""Account for every record of one FASTA file."""

from pathlib import Path

from lengthwise.logs import log, reporting

with reporting(snakemake.log[0], snakemake.scriptdir):
    from lengthwise.fasta import ingest

    summary = ingest(
        Path(snakemake.input.fasta),
        Path(snakemake.output.records),
        Path(snakemake.output.sequences),
        Path(snakemake.output.summary),
        long_policy=snakemake.params.long_sequences["policy"],
        max_residues=snakemake.params.long_sequences["max_residues"],
    )
    log.info(
        "%s: %s records: %s accepted, %s duplicate, %s rejected; %s residues",
        snakemake.wildcards.dataset,
        *(f"{summary[key]:,}" for key in ("records", "accepted", "duplicate", "rejected", "residues")),
    )
