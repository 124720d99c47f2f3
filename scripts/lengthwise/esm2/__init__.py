"""ESM-2: checkpoints, and the forward pass over packed sequences.

In: a checkpoint in fair-esm's layout, and residues. Out: hidden representations, a batch at a time, with what they took.
May import: `system`. Nothing here knows of FASTA files, stores, plans or jobs.

The way of a batch: `tokens` -> `batching` (cut, prepared ahead) -> `engine` (copies, memory, results) -> `model` (the layers).
"""
