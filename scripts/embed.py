"""Embed one job's sequences."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import log, reporting
from lengthwise.system.text import count

with reporting(snakemake.log[0]):
    from lengthwise.store.settings import device_of
    from lengthwise.system.gpus import leased
    from lengthwise.system.slurm import deadline, describe_host

    store = Path(snakemake.params.store)
    device = device_of(store, snakemake.config["device"])
    with leased(device):
        log.info("on %s", describe_host())
        from lengthwise.jobs.embed_job import embed_job

        job_record = embed_job(
            store,
            Path(snakemake.input.work_order),
            Path(snakemake.output.job_record),
            device=device,
            batch_tokens=snakemake.config["batch_tokens"],
            threads=snakemake.threads,
            deadline=deadline(),
            parity=snakemake.config["parity"],
            residency=snakemake.config["residency"],
        )
    log.info(
        "job %s: %s, %d made now, in %.1f s on %s",
        job_record["job"],
        count(len(job_record["shards"]), "shard"),
        len(job_record["made"]),
        job_record["embed_seconds"],
        job_record["device"],
    )
