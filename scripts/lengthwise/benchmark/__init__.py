"""The benchmark: this engine beside fair-esm, transformers and esm-cpp, on the same sequences in one run, interleaved.

In: a checkpoint or a shape, and sequences. Out: a table and a figure. `python -m lengthwise benchmark` starts it.
May import: `jobs`, `store`, `ingest`, `esm2` and below.
"""
