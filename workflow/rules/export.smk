"""Exports: datasets in the layouts of other tools.

In: a dataset's manifest and index. Out: a folder for each export that the config names, replaced atomically.
"""

from lengthwise.store.paths import export_path

EXPORTS = f"{STORE}/datasets/{{dataset}}/exports"
EXPORTED = {
    kind: export_path(f"{STORE}/datasets/{{dataset}}", kind, Path(STORE).name)
    for kind in ("h5", "pt", "biotrainer", "parquet")
}


rule export_h5:
    input:
        manifest=after_plan(MANIFEST),
        index=after_plan(INDEX),
    output:
        entries=EXPORTED["h5"],
        means=f"{EXPORTS}/h5/per-protein.h5",
    log:
        f"{STORE}/logs/export/h5/{{dataset}}.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    resources:
        mem_mb=bounded_mem_mb,
        runtime=reading_minutes,
    params:
        folder=subpath(output.entries, parent=True),
    script:
        "../../scripts/export.py"


# Only the table is an output: there may be thousands of .pt files, and export writes the table after all of them.
use rule export_h5 as export_pt with:
    output:
        entries=EXPORTED["pt"],
    log:
        f"{STORE}/logs/export/pt/{{dataset}}.log",


use rule export_h5 as export_biotrainer with:
    output:
        entries=EXPORTED["biotrainer"],
        means=f"{EXPORTS}/biotrainer/reduced_embeddings_file_{Path(STORE).name}.h5",
    log:
        f"{STORE}/logs/export/biotrainer/{{dataset}}.log",


use rule export_h5 as export_parquet with:
    output:
        entries=EXPORTED["parquet"],
    log:
        f"{STORE}/logs/export/parquet/{{dataset}}.log",
