"""Account for every record of one FASTA file."""

from pathlib import Path

from lengthwise.system.logging import log, reporting

with reporting(snakemake.log[0]):
    from lengthwise.errors import LengthwiseError
    from lengthwise.ingest.identity import input_stamp
    from lengthwise.ingest.ingest import ingest
    from lengthwise.ingest.judge import Policy
    from lengthwise.ingest.normalize import Letters
    from lengthwise.system.files import stamp
    from lengthwise.system.runs import recorded_inputs

    fasta, params, dataset = Path(snakemake.input.fasta), snakemake.params, snakemake.wildcards.dataset
    long_sequences, store = dict(params.long_sequences), Path(snakemake.output.records).parents[2]
    recorded = (recorded_inputs(str(store)) or {}).get(dataset)
    if recorded and not stamp(fasta).items() <= recorded.items():
        raise LengthwiseError(f"{fasta}: changed since this run began; run again once nothing writes to it")
    summary = ingest(
        fasta,
        Path(snakemake.output.records),
        Path(snakemake.output.sequences),
        Path(snakemake.output.records).with_name("summary.json"),
        Policy(
            letters=Letters(**params.letters),
            long_policy=long_sequences.pop("policy"),
            **long_sequences,
            duplicate_ids=params.duplicate_ids,
            nucleotides=params.nucleotides,
            strict=params.strict,
        ),
        memory_bytes=snakemake.resources.mem_mb * 10**6 * 2 // 5,  # the rest is for read buffers and tables
        stamp=input_stamp(fasta, recorded),
    )
    log.info(
        "%s: %s records: %s accepted, %s duplicate, %s rejected; %s residues",
        dataset,
        *(f"{summary[key]:,}" for key in ("records", "accepted", "duplicate", "rejected", "residues")),
    )
