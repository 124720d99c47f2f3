"""A store: the files of one model and one set of settings, and their formats.

In: arrays, settings, paths. Out: shards, lookups, manifests, metrics. Each file is written atomically and checked when read.
A shard is committed by a rename: `shard_writer.ShardWriter.commit`.
May import: `ingest` and `esm2` (shapes of models, statuses, addresses of weights; never torch), `system`.
"""
