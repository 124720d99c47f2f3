"""Check that every record of one dataset has its embedding, and write the dataset's index and manifest."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import log, reporting

with reporting(snakemake.log[0]):
    from lengthwise.jobs.assemble import assemble

    manifest = assemble(
        Path(snakemake.params.store),
        snakemake.wildcards.dataset,
        [Path(job_record).stem for job_record in snakemake.input.job_records],
        Path(snakemake.output.index),
        Path(snakemake.output.manifest).with_name("rejected.tsv"),
        Path(snakemake.output.manifest),
        strict=snakemake.config["strict"],
        memory_bytes=snakemake.resources.mem_mb * 10**6 * 2 // 5,
    )
    log.info("%s: complete, %s records", snakemake.wildcards.dataset, f"{manifest['records']:,}")
