"""Snakemake whose SLURM plugin asks for its jobs every second, instead of less and less often: what faults do shows sooner."""

import asyncio

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor


async def sleep(self):
    await asyncio.sleep(1)


Executor.sleep = sleep

if __name__ == "__main__":
    main()
