"""Plan, embed, assemble.

In: sequences of all datasets. Out: plan/jobs.tsv; a job record per job, with its shards in shards/; per dataset an index, its
lookup and a manifest. Work orders and weights never change under one name, so they are `ancient`. plan/jobs.tsv is `ancient`
too: a new plan alone reruns no job. The files of a dataset are `update`: Snakemake would delete them before a dataset is
assembled again. It keeps a copy meanwhile, and puts it back on failure: about 150
bytes a record, 0.4 s for a million records, whose lookup alone takes 3 s to build.
"""


checkpoint plan:
    input:
        weights=ancient(WEIGHTS),
        sequences=expand(f"{STORE}/inputs/{{dataset}}/sequences.parquet", dataset=DATASETS),
    output:
        jobs=JOBS,
    log:
        f"{STORE}/logs/plan.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: 2
    resources:
        mem_mb=bounded_mem_mb,
        runtime=reading_minutes,
    params:
        store=subpath(output.jobs, ancestor=2),
        datasets=DATASETS,
        retry_rejected=config["retry_rejected"],
    script:
        "../../scripts/plan.py"


rule embed:
    input:
        work_order=ancient(f"{STORE}/plan/jobs/{{job}}.parquet"),
        weights=ancient(WEIGHTS),
        plan=ancient(JOBS),
    output:
        job_record=f"{STORE}/jobs/{{job}}.json",
    log:
        f"{STORE}/logs/embed/{{job}}.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: model_threads
    resources:
        gpu=gpus,
        mem_mb=embed_mem_mb,
        disk_mb=embed_disk_mb,
        runtime=embed_minutes,
    params:
        store=subpath(output.job_record, ancestor=2),
    script:
        "../../scripts/embed.py"


rule assemble:
    input:
        records=f"{STORE}/inputs/{{dataset}}/records.parquet",
        job_records=job_records_of_dataset,
        plan=ancient(JOBS),
    output:
        index=update(INDEX),
        lookup=update(LOOKUP),
        manifest=update(MANIFEST),
    log:
        f"{STORE}/logs/assemble/{{dataset}}.log",
    conda:
        "../../envs/lengthwise.yaml"
    threads: 1
    resources:
        mem_mb=assemble_mem_mb,
        runtime=reading_minutes,
    params:
        store=subpath(output.manifest, ancestor=3),
    script:
        "../../scripts/assemble.py"
