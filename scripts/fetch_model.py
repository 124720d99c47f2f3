"""Download or find the model's checkpoint, and create or check the store's settings."""

import os
import sys
from pathlib import Path

sys.path.insert(0, snakemake.scriptdir)  # this clone's package, whatever other one is installed

from lengthwise.system.logging import reporting

with reporting(snakemake.log[0]):
    from lengthwise.esm2.download import fetch
    from lengthwise.esm2.heads import head_facts
    from lengthwise.store.settings import create_or_check
    from lengthwise.system.files import write_json
    from lengthwise.system.gpus import auto_device

    receipt = fetch(
        snakemake.params.model,
        snakemake.params.folder,
        snakemake.config["weights_url"],
        snakemake.params.model_sha256,
        snakemake.params.contact_regression,
        snakemake.config["weights_source"],
    )
    receipt |= head_facts(Path(receipt["path"]), snakemake.config["outputs"])
    store = Path(snakemake.params.store)
    if not Path(receipt["path"]).is_absolute():  # relative to the store, so that it is valid in any working folder
        receipt["path"] = os.path.relpath(receipt["path"], store)
    auto = auto_device(bool(snakemake.resources.on_cluster))
    create_or_check(store, snakemake.config, receipt, auto)
    write_json(Path(snakemake.output.weights), receipt)
