"""Embed one job's sequences."""

from pathlib import Path

from lengthwise.logs import count, log, reporting

with reporting(snakemake.log[0], snakemake.scriptdir):
    from lengthwise.allocation import deadline, place
    from lengthwise.lease import leased
    from lengthwise.settings import device_of

    store = Path(snakemake.params.store)
    device = device_of(store, snakemake.config["device"])
    with leased(device):
        log.info("on %s", place())
        from lengthwise.embed import embed_job

        commit = embed_job(
            store,
            Path(snakemake.input.spec),
            Path(snakemake.output.commit),
            device=device,
            batch_tokens=snakemake.config["batch_tokens"],
            threads=snakemake.threads,
            deadline=deadline(),
        )
    log.info(
        "job %s: %s, %d made now, in %.1f s on %s",
        commit["job"],
        count(len(commit["shards"]), "shard"),
        len(commit["made"]),
        commit["embed_seconds"],
        commit["device"],
    )
