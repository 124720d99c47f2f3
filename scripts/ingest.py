"""Account for every record of a dataset's FASTA files."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import log, reporting

with reporting(snakemake.log[0]):
    from lengthwise.errors import LengthwiseError
    from lengthwise.ingest.identity import input_stamp
    from lengthwise.ingest.ingest import ingest
    from lengthwise.ingest.judge import Policy
    from lengthwise.ingest.normalize import Letters
    from lengthwise.system.files import stamp
    from lengthwise.system.runs import recorded_inputs

    params, dataset = snakemake.params, snakemake.wildcards.dataset
    files = [Path(path) for path in snakemake.input]
    long_sequences, store = dict(params.long_sequences), Path(snakemake.output.records).parents[2]
    recorded = (recorded_inputs(str(store)) or {}).get(dataset) or [{}] * len(files)
    recorded = [entry if "bytes" in entry else None for entry in recorded]  # the run of a module records paths alone
    for fasta, entry in zip(files, recorded, strict=True):
        if entry and not stamp(fasta).items() <= entry.items():
            raise LengthwiseError(f"{fasta}: changed since this run began; run again once nothing writes to it")
    summary = ingest(
        files,
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
        stamps=[input_stamp(fasta, entry) for fasta, entry in zip(files, recorded, strict=True)],
    )
    log.info(
        "%s: %s records: %s accepted, %s duplicate, %s rejected; %s residues",
        dataset,
        *(f"{summary[key]:,}" for key in ("records", "accepted", "duplicate", "rejected", "residues")),
    )
