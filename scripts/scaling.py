"""Measure time and memory against sequence length on this device."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import reporting

# Threads that spin while they wait make a pass up to 40 times as long on a busy machine. libgomp reads it as torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

with reporting(snakemake.log[0]):
    from lengthwise.report.study.budget import auto_seconds
    from lengthwise.store.settings import device_of, require
    from lengthwise.store.weights import location
    from lengthwise.system.gpus import leased
    from lengthwise.system.slurm import job_number

    store = Path(snakemake.params.store)
    device = device_of(store, snakemake.config["device"])
    asked = snakemake.config["scaling_seconds"]
    with leased(device):
        began = time.perf_counter()
        from lengthwise.report.study.engines import jobs_compile
        from lengthwise.report.study.measure import scaling

        auto = asked == "auto"
        seconds = auto_seconds(store, device) - (time.perf_counter() - began) if auto else asked
        scaling(
            location(store)[0],
            device,
            require(store)["precision"],
            Path(snakemake.output.table),
            threads=snakemake.threads,
            seconds=seconds,
            loading_counts=auto,
            # A scheduler may not enforce what a job asked for.
            memory_bytes=snakemake.resources.mem_mb * 1e6 if job_number() else None,
            compile=jobs_compile(store),
        )
