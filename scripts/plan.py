"""Write the work orders of what no finished shard holds yet."""

from pathlib import Path

from lengthwise.logs import log, reporting

with reporting(snakemake.log[0], snakemake.scriptdir):
    from lengthwise.plan import Sizes, commit_path, plan

    store = Path(snakemake.params.store)
    sizes = Sizes(snakemake.config["job_minutes"] * 60, snakemake.config["shard_bytes"])
    sequences = dict(zip(snakemake.params.datasets, map(Path, snakemake.input.sequences), strict=True))
    jobs = plan(store, sequences, sizes, Path(snakemake.output.jobs))
    new = jobs[[not commit_path(store, job).exists() for job in jobs["job"]]]
    log.info(
        "%s jobs in all; to run: %s, of %s sequences, %s residues, about %.1f minutes of the device and %.2f GB",
        len(jobs),
        len(new),
        f"{new['sequences'].sum():,}",
        f"{new['residues'].sum():,}",
        new["forecast_seconds"].sum() / 60,
        new["forecast_bytes"].sum() / 1e9,
    )
