"""Ingest: one FASTA file becomes a table of all its records and a table of its distinct sequences.

In: a FASTA file, and the config's policy for letters, ids and lengths. Out: records.parquet, sequences.parquet, summary.json.
May import: `esm2` (its tokens), `system`.

A byte passes through `decompress` -> `fasta` (records) -> `judge` (a record's status; `normalize` decides on unusual bytes) ->
`repeats` (duplicates, shared ids) -> `tables`. `nucleotides` refuses a file of DNA or RNA.
"""
