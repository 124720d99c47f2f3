"""Write one dataset in the layout of another tool."""

import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import log, reporting

with reporting(snakemake.log[0]):
    from lengthwise.export.run import export

    folder = Path(snakemake.params.folder)  # exports/<kind>
    n = export(folder.parents[1], folder.name, memory_bytes=snakemake.resources.mem_mb * 10**6 * 2 // 5)
    log.info("%s: %s entries in %s", snakemake.wildcards.dataset, f"{n:,}", folder)
