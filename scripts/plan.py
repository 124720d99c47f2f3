"""Write the work orders of all sequences that no finished shard holds."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import log, reporting

with reporting(snakemake.log[0]):
    import pyarrow.parquet as pq

    from lengthwise.plan.cuts import Sizes
    from lengthwise.plan.disk_check import require_space, unfinished_jobs
    from lengthwise.plan.planner import plan
    from lengthwise.plan.throughput import slowdown
    from lengthwise.store.settings import require
    from lengthwise.store.sizes import missing_bytes
    from lengthwise.system.text import count

    store = Path(snakemake.params.store)
    config = snakemake.config
    settings = require(store)
    sizes = Sizes(config["job_minutes"] * 60, config["shard_bytes"], slowdown(store, settings))
    sequences = dict(zip(snakemake.params.datasets, map(Path, snakemake.input.sequences), strict=True))
    memory_bytes = snakemake.resources.mem_mb * 10**6 * 2 // 5  # the rest is for a job's work order
    retry = snakemake.params.retry_rejected
    jobs = plan(store, sequences, sizes, Path(snakemake.output.jobs), memory_bytes, retry, config["residency"])
    if config["disk_space"] == "refuse":
        require_space(store, jobs, missing_bytes(store, settings, snakemake.params.datasets, config["exports"]))
    new = unfinished_jobs(store, jobs)
    wanted = sum(pq.read_metadata(path).num_rows for path in sequences.values())
    log.info(
        "%s in %s; to embed: %s, %s in %s, and %.2f GB to write",
        count(wanted, "sequence"),
        count(len(sequences), "dataset"),
        count(new["sequences"].sum(), "sequence"),
        count(new["residues"].sum(), "residue"),
        count(len(new), "job"),
        new["forecast_bytes"].sum() / 1e9,
    )
