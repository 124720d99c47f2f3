"""ESM-2: checkpoints, and the forward pass over packed sequences.

In: a checkpoint of fair-esm or of transformers, and residues. Out: hidden representations, a batch at a time, with times and
memory.
May import: `system`. Nothing here knows of FASTA files, stores, plans or jobs.

A batch passes through `tokens` -> `batching` (cut, prefetched) -> `engine` (copies, memory) -> `model` and `rotary` (the layers)
-> `outputs` (pooling). A checkpoint passes through `sources` (its address) -> `download` or `hub` -> `fair_esm_layout` or
`hugging_face_layout` (opened) -> `checkpoint` (checked, loaded).
"""
