"""Scaling study and report.

In: weights; commits and manifests. Out: scaling.tsv; tables, figures and index.html.
"""

FIGURES = ["throughput", "memory", "scaling_throughput", "scaling_memory"]


rule scaling:
    input:
        weights=ancient(WEIGHTS),
    output:
        table=f"{STORE}/report/scaling.tsv",
    log:
        f"{STORE}/logs/scaling.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: model_threads
    resources:
        gpu=gpus,
    params:
        store=subpath(output.table, ancestor=2),
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
        throughput=report(
            f"{STORE}/report/throughput.svg",
            caption="../report/throughput.rst",
            category="In production",
        ),
        memory=report(
            f"{STORE}/report/memory.svg",
            caption="../report/memory.rst",
            category="In production",
        ),
        scaling_throughput=report(
            f"{STORE}/report/scaling_throughput.svg",
            caption="../report/scaling_throughput.rst",
            category="Scaling study",
        ),
        scaling_memory=report(
            f"{STORE}/report/scaling_memory.svg",
            caption="../report/scaling_memory.rst",
            category="Scaling study",
        ),
        pictures=expand(f"{STORE}/report/{{figure}}.png", figure=FIGURES),
        metrics=f"{STORE}/report/metrics.tsv",
        by_length=f"{STORE}/report/by_length.tsv",
    log:
        f"{STORE}/logs/summarize.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    params:
        store=subpath(output.page, ancestor=2),
        datasets=list(DATASETS),
    script:
        "../../scripts/summarize.py"
