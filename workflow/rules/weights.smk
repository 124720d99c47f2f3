"""Weights: the configured model's checkpoint on this machine.

In: a model's name or path. Out: weights.json, which identifies the checkpoint; once per store settings.json.
The checkpoint and settings.json are no declared outputs: Snakemake would delete them before a rerun.
"""


rule fetch_model:
    input:
        checkpoint=checkpoint_given,
    output:
        weights=WEIGHTS,
    log:
        f"{STORE}/logs/fetch_model.log",
    localrule: True
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    resources:
        on_cluster=on_cluster,
    params:
        model=config["model"],
        folder=config["weights"],
        model_sha256=config["model_sha256"],
        contact_regression=config["contact_regression"],
        store=subpath(output.weights, parent=True),
    script:
        "../../scripts/fetch_model.py"
