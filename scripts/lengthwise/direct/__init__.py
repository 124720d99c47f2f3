"""Direct: sequences in a program's memory, or a FASTA file, become arrays; no store, no workflow, no files of results.

In: strings, Biopython's records or a FASTA file, and a model. Out: an `Embedding` for each, in the order given.
May import: `store` (its layers by number), `ingest`, `esm2`, `system`.

A sequence passes through `inputs` (a record with its status) -> `windows` (sorted, cut into batches, embedded) -> `result`.
`model` holds the weights.
"""
