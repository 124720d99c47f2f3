"""Forecast the disk space, memory and time of a run."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import log, reporting

with reporting(snakemake.log[0]):
    from lengthwise.esm2.sources import path_of
    from lengthwise.plan import forecast
    from lengthwise.plan.cuts import Sizes
    from lengthwise.plan.throughput import slowdown
    from lengthwise.store.settings import expected

    config, folders = snakemake.config, [Path(table).parent for table in snakemake.input.sequences]
    store = folders[0].parent.parent
    settings = expected(store, config, snakemake.params.auto_device)
    made = forecast.forecast(
        store,
        settings,
        {folder.name: folder for folder in folders},
        Sizes(config["job_minutes"] * 60, config["shard_bytes"], slowdown(store, settings)),
        config["batch_tokens"],
        snakemake.params.threads,
        snakemake.resources.mem_mb * 10**6 * 2 // 5,
        config["exports"],
        None if (store / "weights.json").exists() else path_of(config["model"], config["weights"]),
        config["device_like"],
        config["residency"],
    )
    forecast.write(made, store / "forecast")
    log.info("%s", store / "forecast" / "forecast.json")
