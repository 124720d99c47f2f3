"""Benchmark: the throughput and the numerical errors of this engine beside fair-esm, transformers and esm-cpp.

In: a checkpoint or a model's shape, and sequences. Out: a table and a figure. The command is `python -m lengthwise benchmark`.
May import: `jobs`, `store`, `ingest`, `esm2` and below. It runs where torch, numpy, safetensors and fair-esm are installed;
other engines, and the figure, are left out where their packages are missing.
"""
