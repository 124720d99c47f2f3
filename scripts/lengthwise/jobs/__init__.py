"""Jobs: embed a work order; assemble a dataset.

In: a work order and a checkpoint; the job records of a dataset. Out: shards, metrics and a
job record; index, lookup and manifest.
May import: `plan`, `store`, `esm2` and below.
"""
