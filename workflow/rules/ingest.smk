"""Ingest: one dataset at a time.

In: its FASTA files, in order. Out: the table of its records, the table of its distinct sequences, and a summary with counts. The summary is no
declared output: it says whose tables these are, and Snakemake would delete it before files are read again, or refused.
"""


rule ingest:
    input:
        fasta=fasta_of,
    output:
        records=f"{STORE}/inputs/{{dataset}}/records.parquet",
        sequences=f"{STORE}/inputs/{{dataset}}/sequences.parquet",
    log:
        f"{STORE}/logs/ingest/{{dataset}}.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    resources:
        mem_mb=bounded_mem_mb,
        runtime=reading_minutes,
    params:
        fasta=fasta_state,
        long_sequences=config["long_sequences"],
        letters=config["letters"],
        duplicate_ids=config["duplicate_ids"],
        nucleotides=config["nucleotides"],
        strict=config["strict"],
    script:
        "../../scripts/ingest.py"
