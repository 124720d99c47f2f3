"""Ingest: one FASTA file becomes a table of all its records and a table of its distinct sequences.

In: a FASTA file, and what the config says of letters, ids and lengths. Out: records.parquet, sequences.parquet, summary.json.
May import: `esm2` (its tokens), `system`.

The way of a byte: `decompress` -> `fasta` (records) -> `normalize` (letters) -> `judge` -> `repeats` -> `tables`.
"""
