"""Forecast: disk, memory and time of a run, printed at the end of `snakemake forecast`.

In: the tables of all datasets; the weights if the model's name does not tell its shape. Out: forecast.txt and forecast.json
in forecast/. They are no declared outputs, so the rule always runs: free space and finished work change between runs.
"""


rule forecast:
    input:
        weights=weights_of_unknown_shape,
        records=expand(f"{STORE}/inputs/{{dataset}}/records.parquet", dataset=DATASETS),
        sequences=expand(f"{STORE}/inputs/{{dataset}}/sequences.parquet", dataset=DATASETS),
    log:
        f"{STORE}/logs/forecast.log",
    localrule: True
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    resources:
        mem_mb=2000,
    params:
        auto_device=device_of_new_store,
        threads=computing_threads,
    script:
        "../../scripts/forecast.py"
