"""Scaling study and report.

In: weights; commits and manifests. Out: scaling.tsv; tables, figures and index.html.
"""


rule scaling:
    input:
        weights=ancient(f"{STORE}/weights.json"),
    output:
        table=f"{STORE}/report/scaling.tsv",
    log:
        f"{STORE}/logs/scaling.log",
    params:
        store=STORE,
    conda:
        "../../envs/lengthwise.yaml"
    threads: model_threads
    resources:
        gpu=gpus,
    script:
        "../../scripts/scaling.py"


rule summarize:
    input:
        jobs=ancient(JOBS),
        commits=commits_of_all,
        manifests=expand(MANIFEST, dataset=DATASETS),
        scaling=f"{STORE}/report/scaling.tsv",
    output:
        page=report(f"{STORE}/report/index.html", caption="../report/index.rst", category="Report"),
        metrics=f"{STORE}/report/metrics.tsv",
        by_length=f"{STORE}/report/by_length.tsv",
    log:
        f"{STORE}/logs/summarize.log",
    params:
        store=STORE,
        datasets=list(DATASETS),
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    script:
        "../../scripts/summarize.py"
