"""Scaling study and report.

In: weights; job records and manifests. Out: scaling.tsv, if the config asks for the study; windows.tsv, if long proteins are in
windows; tables, figures and index.html, with or without these.
"""

FIGURES = {
    "lengths": "Your proteins",
    "throughput": "In production",
    "memory": "In production",
    "time": "In production",
    "scaling_memory": "Scaling study",
    "no_grad": "Scaling study",
    "half_precision": "Scaling study",
    "copies": "Scaling study",
    "scaling_throughput": "Scaling study",
    "scaling_time": "Scaling study",
    "map": "Embeddings",
}
TABLES = ["metrics", "by_length", "jobs", "devices", "datasets", "lengths", "laws", "map"]


# After the embedding where both want the same cores or GPU: what the study may take goes by what the embedding took.
rule scaling:
    input:
        weights=weights_after_plan,
    output:
        table=f"{STORE}/report/scaling.tsv",
    log:
        f"{STORE}/logs/scaling.log",
    priority: -1
    conda:
        "../../envs/lengthwise.yaml"
    threads: model_threads
    resources:
        gpu=gpus,
        mem_mb=scaling_mem_mb,
        runtime=scaling_minutes,
    params:
        store=subpath(output.table, ancestor=2),
    script:
        "../../scripts/scaling.py"


# What windows cost in accuracy: a few long proteins once more, whole.
rule windows:
    input:
        weights=weights_after_plan,
        manifests=expand(MANIFEST, dataset=DATASETS),
    output:
        table=f"{STORE}/report/windows.tsv",
    log:
        f"{STORE}/logs/windows.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: model_threads
    resources:
        gpu=gpus,
        mem_mb=scaling_mem_mb,
        runtime=short_minutes,
    params:
        store=subpath(output.table, ancestor=2),
        datasets=DATASETS,
    script:
        "../../scripts/windows.py"


rule summarize:
    input:
        jobs=ancient(JOBS),
        job_records=job_records_of_all,
        manifests=expand(MANIFEST, dataset=DATASETS),
        scaling=scaling_study,
        windows=windows_compared,
    output:
        **{figure: captioned(figure, category) for figure, category in FIGURES.items()},
        page=report(f"{STORE}/report/index.html", caption="../report/index.rst", category="Report"),
        tables=expand(f"{STORE}/report/{{table}}.{{ending}}", table=TABLES, ending=["tsv", "parquet"]),
        study=f"{STORE}/report/scaling.parquet",
        columns=f"{STORE}/report/columns.tsv",
    log:
        f"{STORE}/logs/summarize.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    resources:
        mem_mb=summarize_mem_mb,
        runtime=short_minutes,
    params:
        store=subpath(output.page, ancestor=2),
        datasets=DATASETS,
    script:
        "../../scripts/summarize.py"
