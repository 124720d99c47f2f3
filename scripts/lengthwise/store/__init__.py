"""A store: the files of one model and one set of settings, and what each of them holds.

In: arrays, settings, paths. Out: shards, lookups, manifests, metrics, each written whole or not at all and read with care.
May import: `ingest` and `esm2` (the shapes of models, statuses, addresses of weights; never torch), `system`.
"""
