"""Account for every record of one FASTA file."""

from pathlib import Path

from lengthwise.system.logging import log, reporting

with reporting(snakemake.log[0], snakemake.scriptdir):
    from lengthwise.errors import LengthwiseError
    from lengthwise.ingest.ingest import ingest
    from lengthwise.ingest.judge import Policy
    from lengthwise.ingest.normalize import Letters
    from lengthwise.system.files import read_json, stamp

    fasta, params, dataset = Path(snakemake.input.fasta), snakemake.params, snakemake.wildcards.dataset
    planned_inputs = Path(snakemake.output.records).parents[2] / "plan" / "inputs.json"
    if stamp(fasta) != read_json(planned_inputs, dataset)[dataset]:
        raise LengthwiseError(f"{fasta}: changed since this run was planned; run again once nothing writes to it")
    summary = ingest(
        fasta,
        Path(snakemake.output.records),
        Path(snakemake.output.sequences),
        Path(snakemake.output.summary),
        Policy(
            letters=Letters(**params.letters),
            long_policy=params.long_sequences["policy"],
            max_residues=params.long_sequences["max_residues"],
            duplicate_ids=params.duplicate_ids,
            nucleotides=params.nucleotides,
            strict=params.strict,
        ),
        memory_bytes=snakemake.resources.mem_mb * 10**6 * 2 // 5,  # the rest is for read buffers and tables
    )
    log.info(
        "%s: %s records: %s accepted, %s duplicate, %s rejected; %s residues",
        dataset,
        *(f"{summary[key]:,}" for key in ("records", "accepted", "duplicate", "rejected", "residues")),
    )
