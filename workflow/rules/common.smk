"""The checked config, the store's paths, and the functions that rules name.

In: the config. Out: DATASETS, STORE and the functions below.
"""

import atexit
import csv
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
from lengthwise.esm2.config import MODELS
from lengthwise.maintain.cleanup import broken_job_records, remove_leftovers
from lengthwise.maintain.run_summary import failure_lines_of, forecast_lines_of, success_lines_of
from lengthwise.store.paths import store_name
from lengthwise.store.settings import guard, load
from lengthwise.store.weights import note_new_time
from lengthwise.system.files import size_and_mtime, stamp, write_json
from lengthwise.system.gpus import refuse_missing_gpu
from lengthwise.system.locks import shared_store_lock
from lengthwise.system.logging import ERROR_PREFIX
from lengthwise.system.runs import explain_lock, record_run

STARTED = time.time()
PRESENCE = ExitStack()
atexit.register(PRESENCE.close)
RUN = Path(".snakemake/lengthwise.json")
BEGUN = []  # with something in it once this run was let in

# What these options of the command line ask for changes no result.
LOOKS_ONLY = """dryrun unlock touch lint report dag rulegraph filegraph d3dag list_target_rules list_rules summary
detailed_summary list_changes list_untracked cleanup_metadata delete_all_output delete_temp_output archive""".split()


@functools.cache
def options():
    """The command line, profiles included; None where another program called Snakemake."""
    try:
        return snakemake.cli.parse_args(sys.argv[1:])[1]
    except SystemExit:
        return None


def may_change_files():
    """Whether this is a run, and not a look."""
    given = options()
    return given is not None and not any(getattr(given, option, None) for option in LOOKS_ONLY)


def locked():
    """Whether another run holds this folder's lock, or left it."""
    return any(Path(".snakemake/locks").glob("*"))


def put_right(store):
    """A job whose shards are gone runs again once its commit is gone too; lost settings come back from a manifest.

    What killed runs left is removed; from then on `python -m lengthwise prune` knows that a run is at work.
    """
    broken = broken_job_records(store)
    lost = not (store / "settings.json").exists() and load(store)
    for commit, shards in broken.items():
        print(f"lengthwise: job {commit.stem}: {shards[0]} is gone or cut short; a run makes it again", file=sys.stderr)
    if may_change_files() and not locked():
        for commit in broken:
            commit.unlink()
        if lost:
            write_json(store / "settings.json", lost)
        remove_leftovers(store)
        PRESENCE.enter_context(shared_store_lock(store))


def say_why_refused(why):
    """After Snakemake's own lines about the lock, unless it did not mind."""
    if not BEGUN:
        print(f"{ERROR_PREFIX}{why}", file=sys.stderr)


try:
    config.update(lengthwise.config.validate(config, Path(workflow.basedir) / "schemas" / "config.schema.yaml"))
    DATASETS = lengthwise.config.datasets(config["inputs"])
    STATES = {dataset: size_and_mtime(path) for dataset, path in DATASETS.items()}
    STAMPS = {dataset: stamp(path) for dataset, path in DATASETS.items()}
    STORE = str(Path(config["results"]) / store_name(config["model"]))
    guard(Path(STORE), config)
    if workflow.is_main_process:
        put_right(Path(STORE))
        if locked() and may_change_files():
            atexit.register(say_why_refused, explain_lock(RUN))
except (LengthwiseError, OSError) as error:
    sys.exit(f"{ERROR_PREFIX}{error}")  # one line; an exception would show the Snakefile's own lines too

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
    return DATASETS[wildcards.dataset]


def fasta_state(wildcards):
    """Size and time: a file replaced by an older one is noticed."""
    return STATES[wildcards.dataset]


def checkpoint_given(wildcards):
    """The checkpoint, where the config names one by path."""
    return ancient(config["model"]) if config["model"].endswith(".pt") else []


def weights_of_unknown_shape(wildcards):
    """A named model need not be downloaded to say what it will take."""
    return [] if config["model"] in MODELS else ancient(WEIGHTS)


@functools.lru_cache(maxsize=2)
def read_plan(size, mtime_ns):
    """{job: its row} of the plan with this size and time, and {dataset: its commits}; under "" all of them."""
    with open(JOBS) as table:
        rows = {row["job"]: row for row in csv.DictReader(table, delimiter="\t")}
    commits = {"": [f"{STORE}/jobs/{job}.json" for job in rows]}
    for row, commit in zip(rows.values(), commits[""]):
        for dataset in row["datasets"].split(","):
            commits.setdefault(dataset, []).append(commit)
    return rows, commits


def planned():
    state = os.stat(JOBS)
    return read_plan(state.st_size, state.st_mtime_ns)


def planned_job_records(dataset):
    return planned()[1].get(dataset, [])


def job_records_of_all(wildcards):
    checkpoints.plan.get()
    return planned_job_records("")


def job_records_of_dataset(wildcards):
    checkpoints.plan.get()
    return planned_job_records(wildcards.dataset)


def scaling_study(wildcards):
    """The study's table, unless the config leaves the study out."""
    return f"{STORE}/report/scaling.tsv" if config["scaling"] else []


def captioned(figure, category):
    """A figure of the report, for Snakemake's own report too."""
    return report(f"{STORE}/report/{figure}.svg", caption=f"../report/{figure}.rst", category=category)


def begin():
    """Before any job."""
    require_device()
    if workflow.is_main_process:
        BEGUN.append(True)
        try:
            record_run(RUN)
            note_new_time(Path(STORE))
            write_json(Path(PLANNED_INPUTS), STAMPS)  # a job on another node reads its config and inputs again
        except LengthwiseError as error:
            sys.exit(f"{ERROR_PREFIX}{error}")


def require_device():
    """Before any job: a run on this machine needs the device that was asked for; a forecast for it does not."""
    forecast_alone = options() is not None and set(options().targets) == {"forecast"}
    if not workflow.non_local_exec and workflow.is_main_process and uses_gpu() and not forecast_alone:
        try:
            refuse_missing_gpu()
        except LengthwiseError as error:
            sys.exit(f"{ERROR_PREFIX}{error}")


def success_lines():
    if lines := forecast_lines_of(Path(STORE), STARTED):
        return lines
    commits = planned_job_records("") if os.path.exists(JOBS) else []
    return success_lines_of(Path(STORE), list(DATASETS), commits, STARTED, time.time() - STARTED)


def failure_lines():
    return failure_lines_of(Path(STORE), STARTED)


def say_at_the_end(lines):
    """Print after Snakemake's own closing lines."""
    atexit.register(print, *lines, sep="\n", file=sys.stderr)
