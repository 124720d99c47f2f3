"""Weights: the configured model's checkpoint on this machine.

In: a model's name or path. Out: weights.json, what the checkpoint is; and, once per store, settings.json.
The checkpoint itself and settings.json are no outputs: Snakemake deletes outputs before it makes them again.
"""


rule fetch_model:
    input:
        checkpoint=checkpoint_given,
    output:
        weights=f"{STORE}/weights.json",
    log:
        f"{STORE}/logs/fetch_model.log",
    params:
        model=config["model"],
        folder=config["weights"],
        store=STORE,
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    resources:
        on_cluster=on_cluster,
    script:
        "../../scripts/fetch_model.py"
