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
import lengthwise.fasta
from lengthwise.closing import failure_lines_of, forecast_lines_of, success_lines_of
from lengthwise.device import auto_device, refuse_missing_gpu
from lengthwise.errors import LengthwiseError
from lengthwise.files import stamp, write_json
from lengthwise.presence import at_work
from lengthwise.recovery import broken_commits, remove_leftovers
from lengthwise.settings import guard, load
from lengthwise.shapes import MODELS
from lengthwise.weights import note_new_time

STARTED = time.time()
PRESENCE = ExitStack()
atexit.register(PRESENCE.close)


# What these options of the command line ask for changes no result.
LOOKS_ONLY = """dryrun unlock touch lint report dag rulegraph filegraph d3dag list_target_rules list_rules summary
detailed_summary list_changes list_untracked cleanup_metadata delete_all_output delete_temp_output archive""".split()


def may_change_files():
    """Whether this is a run, and the only one: not a look, no other run's lock."""
    try:
        given = snakemake.cli.parse_args(sys.argv[1:])[1]
    except SystemExit:  # called by another program
        return False
    return not any(getattr(given, option, None) for option in LOOKS_ONLY) and not any(
        Path(".snakemake/locks").glob("*")
    )


def put_right(store):
    """A job whose shards are gone runs again once its commit is gone too; lost settings come back from a manifest.

    What killed runs left is removed; from then on `python -m lengthwise prune` knows that a run is at work.
    """
    broken = broken_commits(store)
    lost = not (store / "settings.json").exists() and load(store)
    for commit, shards in broken.items():
        print(f"lengthwise: job {commit.stem}: {shards[0]} is gone or cut short; a run makes it again", file=sys.stderr)
    if may_change_files():
        for commit in broken:
            commit.unlink()
        if lost:
            write_json(store / "settings.json", lost)
        remove_leftovers(store)
        PRESENCE.enter_context(at_work(store))


try:
    config.update(lengthwise.config.validate(config, Path(workflow.basedir) / "schemas" / "config.schema.yaml"))
    DATASETS = lengthwise.config.datasets(config["inputs"])
    STATES = {dataset: lengthwise.fasta.state(path) for dataset, path in DATASETS.items()}
    STAMPS = {dataset: stamp(path) for dataset, path in DATASETS.items()}
    STORE = str(Path(config["results"]) / lengthwise.config.store_name(config["model"]))
    guard(Path(STORE), config)
    if workflow.is_main_process:
        put_right(Path(STORE))
except (LengthwiseError, OSError) as error:
    sys.exit(f"lengthwise: error: {error}")  # one line; an exception would show the Snakefile's own lines too

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
def jobs_by_dataset(size, mtime_ns):
    """{dataset: its commits} of the plan with this size and time; under "" all of them."""
    with open(JOBS) as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    commits = {"": [f"{STORE}/jobs/{row['job']}.json" for row in rows]}
    for row, commit in zip(rows, commits[""]):
        for dataset in row["datasets"].split(","):
            commits.setdefault(dataset, []).append(commit)
    return commits


def planned_commits(dataset):
    state = os.stat(JOBS)
    return jobs_by_dataset(state.st_size, state.st_mtime_ns).get(dataset, [])


def commits_of_all(wildcards):
    checkpoints.plan.get()
    return planned_commits("")


def commits_of_dataset(wildcards):
    checkpoints.plan.get()
    return planned_commits(wildcards.dataset)


def on_cluster(wildcards):
    return int(bool(workflow.non_local_exec))


def uses_gpu():
    """The config's device; auto means what the store was made for."""
    if config["device"] != "auto":
        return config["device"] == "cuda"
    settings = load(Path(STORE))
    return (settings["device"] if settings else auto_device(workflow.non_local_exec)) == "cuda"


def device_of_new_store(wildcards):
    return "cuda" if uses_gpu() else "cpu"


def gpus(wildcards):
    return int(uses_gpu())


def model_threads(wildcards):
    """All cores where the CPU computes; a few beside a GPU."""
    if uses_gpu():
        return 4
    return workflow.cores or 8


def begin():
    """Before any job."""
    require_device()
    if workflow.is_main_process:
        note_new_time(Path(STORE))
        write_json(Path(PLANNED_INPUTS), STAMPS)  # a job on another node reads its config and inputs again


def require_device():
    """Before any job: a run on this machine needs the device that was asked for."""
    if not workflow.non_local_exec and workflow.is_main_process and uses_gpu():
        try:
            refuse_missing_gpu()
        except LengthwiseError as error:
            sys.exit(f"lengthwise: error: {error}")


def success_lines():
    if lines := forecast_lines_of(Path(STORE), STARTED):
        return lines
    commits = planned_commits("") if os.path.exists(JOBS) else []
    return success_lines_of(Path(STORE), list(DATASETS), commits, STARTED, time.time() - STARTED)


def failure_lines():
    return failure_lines_of(Path(STORE), STARTED)


def say_at_the_end(lines):
    """Print after Snakemake's own closing lines."""
    atexit.register(print, *lines, sep="\n", file=sys.stderr)
