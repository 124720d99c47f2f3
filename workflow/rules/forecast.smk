"""Forecast: what a run will take, said at the end of `snakemake forecast`.

In: the tables of all datasets; the weights where only they tell the model's shape. Out: forecast.txt and forecast.json
in forecast/. They are no declared outputs: what is free and what is finished changes, so it is always made anew.
"""


rule forecast:
    input:
        weights=weights_of_unknown_shape,
        records=expand(f"{STORE}/inputs/{{dataset}}/records.parquet", dataset=DATASETS),
        sequences=expand(f"{STORE}/inputs/{{dataset}}/sequences.parquet", dataset=DATASETS),
    log:
        f"{STORE}/logs/forecast.log",
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
