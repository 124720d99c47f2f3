"""The checked config, the store's paths, and the input functions of the rules.

In: the config. Out: DATASETS, STORE, the paths and functions below.
Every job, on every node, runs this file again: what only a run may do asks `workflow.is_main_process`.
"""

import atexit
import functools
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parent / "scripts"))

import snakemake.cli

import lengthwise.config
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import MODELS
from lengthwise.maintain.cleanup import broken_job_records, remove_leftovers
from lengthwise.maintain.run_summary import failure_lines_of, forecast_lines_of, success_lines_of
from lengthwise.plan.jobs_table import job_rows, planned_job_records
from lengthwise.store.paths import store_name
from lengthwise.store.settings import guard, load
from lengthwise.store.weights import note_new_time
from lengthwise.system.files import size_and_mtime, stamp, write_json
from lengthwise.system.gpus import refuse_missing_gpu
from lengthwise.system.locks import shared_store_lock
from lengthwise.system.logging import ERROR_PREFIX
from lengthwise.system.runs import explain_lock, record_run

STARTED_SECONDS = time.time()
RUN_RECORD = Path(".snakemake/lengthwise.json")

# The run holds the store's lock until its process ends.
STORE_LOCK = ExitStack()
atexit.register(STORE_LOCK.close)

# `onstart` appends to this list: Snakemake has got the folder's lock.
LOCK_ACQUIRED = []

# Command line options with which Snakemake runs no job.
READ_ONLY_OPTIONS = (
    """dryrun unlock touch lint report dag rulegraph filegraph d3dag list_target_rules list_rules summary
detailed_summary list_changes list_untracked cleanup_metadata delete_all_output delete_temp_output archive""".split()
)


@functools.cache
def command_line():
    """The parsed command line, profiles included; None if another program called Snakemake."""
    try:
        return snakemake.cli.parse_args(sys.argv[1:])[1]
    except SystemExit:
        return None


def runs_jobs():
    """Whether this command runs jobs."""
    options = command_line()
    return options is not None and not any(getattr(options, option, None) for option in READ_ONLY_OPTIONS)


def folder_is_locked():
    """Whether a Snakemake lock is in this folder, of another run or of a killed one."""
    return any(Path(".snakemake/locks").glob("*"))


def recover_store(store):
    """Repair what a killed run or lost files left, and lock the store against `python -m lengthwise prune`.

    Removes the job records of lost or truncated shards, so that these jobs run again. Restores lost settings from a
    manifest. Removes leftover temporary files. A command that runs no jobs only prints what is broken.
    """
    broken = broken_job_records(store)
    lost_settings = not (store / "settings.json").exists() and load(store)
    for job_record, shards in broken.items():
        print(
            f"lengthwise: job {job_record.stem}: the shard {shards[0]} is missing or truncated; a run makes it again",
            file=sys.stderr,
        )
    if runs_jobs() and not folder_is_locked():
        for job_record in broken:
            job_record.unlink()
        if lost_settings:
            write_json(store / "settings.json", lost_settings)
        remove_leftovers(store)
        STORE_LOCK.enter_context(shared_store_lock(store))


def print_lock_holder(line):
    """Print after Snakemake's own lines who holds the folder's lock, unless Snakemake has got it (`--nolock`)."""
    if not LOCK_ACQUIRED:
        print(f"{ERROR_PREFIX}{line}", file=sys.stderr)


try:
    config.update(lengthwise.config.validate(config, Path(workflow.basedir) / "schemas" / "config.schema.yaml"))
    DATASETS = lengthwise.config.datasets(config["inputs"])
    FASTA_STATES = {dataset: size_and_mtime(path) for dataset, path in DATASETS.items()}
    FASTA_STAMPS = {dataset: stamp(path) for dataset, path in DATASETS.items()}
    STORE = str(Path(config["results"]) / store_name(config["model"]))
    guard(Path(STORE), config)
    if workflow.is_main_process:
        recover_store(Path(STORE))
        if folder_is_locked() and runs_jobs():
            atexit.register(print_lock_holder, explain_lock(RUN_RECORD))
except (LengthwiseError, OSError) as error:
    sys.exit(f"{ERROR_PREFIX}{error}")  # an exception would print lines of the Snakefile too

MANIFEST = f"{STORE}/datasets/{{dataset}}/manifest.json"
WEIGHTS = f"{STORE}/weights.json"
INDEX = f"{STORE}/datasets/{{dataset}}/index.parquet"
LOOKUP = f"{STORE}/datasets/{{dataset}}/lookup.arrow"
JOBS = f"{STORE}/plan/jobs.tsv"
PLANNED_INPUTS = f"{STORE}/plan/inputs.json"


wildcard_constraints:
    dataset="[A-Za-z0-9._-]+",
    job="[0-9a-f]{16}",


def fasta_of(wildcards):
    """The FASTA file of a dataset."""
    return DATASETS[wildcards.dataset]


def fasta_state(wildcards):
    """Its size and mtime. As a param it also detects a file replaced by an older one."""
    return FASTA_STATES[wildcards.dataset]


def checkpoint_given(wildcards):
    """The checkpoint file, if the config names the model by path."""
    return ancient(config["model"]) if config["model"].endswith(".pt") else []


def weights_of_unknown_shape(wildcards):
    """weights.json, unless the model's name already tells its shape: then a forecast needs no download."""
    return [] if config["model"] in MODELS else ancient(WEIGHTS)


def job_records_of_all(wildcards):
    """The job records of all planned jobs."""
    checkpoints.plan.get()
    return planned_job_records(STORE)


def job_records_of_dataset(wildcards):
    """The job records of the jobs that embed sequences of a dataset."""
    checkpoints.plan.get()
    return planned_job_records(STORE, wildcards.dataset)


def scaling_study(wildcards):
    """The study's table, unless the config leaves the study out."""
    return f"{STORE}/report/scaling.tsv" if config["scaling"] else []


def captioned(figure, category):
    """A figure of the report, with its caption for `snakemake --report`."""
    return report(f"{STORE}/report/{figure}.svg", caption=f"../report/{figure}.rst", category=category)


def start_run():
    """Check the device and write the run's record, before any job."""
    require_device()
    if workflow.is_main_process:
        LOCK_ACQUIRED.append(True)
        try:
            record_run(RUN_RECORD)
            note_new_time(Path(STORE))
            write_json(Path(PLANNED_INPUTS), FASTA_STAMPS)  # a job refuses a FASTA that changed since
        except LengthwiseError as error:
            sys.exit(f"{ERROR_PREFIX}{error}")


def require_device():
    """End a local run whose device is missing. A forecast alone needs no device."""
    forecast_alone = command_line() is not None and set(command_line().targets) == {"forecast"}
    if not workflow.non_local_exec and workflow.is_main_process and uses_gpu() and not forecast_alone:
        try:
            refuse_missing_gpu()
        except LengthwiseError as error:
            sys.exit(f"{ERROR_PREFIX}{error}")


def success_lines():
    """The forecast if this run made one, else the summary of the run."""
    if lines := forecast_lines_of(Path(STORE), STARTED_SECONDS):
        return lines
    job_records = planned_job_records(STORE) if os.path.exists(JOBS) else []
    seconds = time.time() - STARTED_SECONDS
    return success_lines_of(Path(STORE), list(DATASETS), job_records, STARTED_SECONDS, seconds)


def failure_lines():
    """The errors in the logs of this run's jobs."""
    return failure_lines_of(Path(STORE), STARTED_SECONDS)


def print_at_exit(lines):
    """Print lines after Snakemake's own closing lines."""
    atexit.register(print, *lines, sep="\n", file=sys.stderr)
