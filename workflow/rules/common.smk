"""The checked config, the store's paths, and the input functions of the rules.

In: the config. Out: DATASETS, STORE, the paths and functions below.
Every job, on every node, runs this file again: what only a run may do asks `workflow.is_main_process`.
"""

import atexit
import functools
import logging
import os
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import snakemake.cli
from snakemake.logging import logger

import lengthwise.config
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import MODELS
from lengthwise.esm2.sources import is_path, weight_files
from lengthwise.ingest.identity import expected_stamps, policy_of, read_summary
from lengthwise.maintain.cleanup import remove_leftovers
from lengthwise.maintain.killed_jobs import REQUESTS, Evidence, FailedJob
from lengthwise.maintain.run_summary import failure_lines_of, forecast_lines_of, success_lines_of, working_folder
from lengthwise.maintain import stale
from lengthwise.plan.jobs_table import job_rows, planned_job_records
from lengthwise.store.paths import store_name
from lengthwise.store.settings import guard, load
from lengthwise.store.weights import note_new_time
from lengthwise.system.control_groups import count_oom_kills
from lengthwise.system.extras import require_workflow
from lengthwise.system.gpus import refuse_missing_gpu
from lengthwise.system.locks import run_lock, shared_store_lock
from lengthwise.system.logging import error_line
from lengthwise.system.runs import RUN_RECORD, explain_lock, inputs_of, record_inputs
from lengthwise.system.runs import record_run, recorded_inputs, this_run
from lengthwise.system.text import printable

STARTED_SECONDS = time.time()
OOM_KILLS = count_oom_kills() if workflow.is_main_process else {}

# The run holds the store's locks until its process ends.
STORE_LOCKS = ExitStack()
atexit.register(STORE_LOCKS.close)

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


# Another workflow may give the rules of a module other names.
FORECAST_RULE = workflow.modifier.modify_rulename("forecast")

# {store: what this process has found of it}: another workflow may parse this file several times, for one store or for several.
FOUND = vars(workflow).setdefault("lengthwise_stores", {})

WORKING_FOLDER = working_folder(getattr(command_line(), "directory", None))


def runs_jobs():
    """Whether this command runs jobs."""
    options = command_line()
    return options is not None and not any(getattr(options, option, None) for option in READ_ONLY_OPTIONS)


def wants_everything():
    """Whether this command's target is the default one, without limits."""
    options = command_line()
    return set(options.targets) <= {"all"} and not options.until and not options.omit_from


def folder_is_locked():
    """Whether a Snakemake lock in this folder, of another run or of a killed one, keeps this command out."""
    return not getattr(command_line(), "nolock", False) and any(Path(".snakemake/locks").glob("*"))


def forecasts_alone():
    """Whether this command only forecasts: it needs no device and leaves the store to the run that may be at work in it."""
    return command_line() is not None and set(command_line().targets) == {FORECAST_RULE}


def lock_store(store):
    """Hold the locks of this run: no other run in the store, no `python -m lengthwise prune --delete`.

    In between nothing else works in the store, unless a killed run's jobs do: what killed runs left goes.
    """
    if not STORE_LOCKS.enter_context(run_lock(store, this_run())):
        print(
            f"lengthwise: {store}: this file system has no locks; let no other run work in this store", file=sys.stderr
        )
    remove_leftovers(store)  # the shared lock would keep it from the exclusive one
    STORE_LOCKS.enter_context(shared_store_lock(store))


def find_stale(store):
    """The outputs that have to be made again; prints why. A run locks the store, and mends what needs no job."""
    stamps = {name: expected_stamps(store / "inputs" / name, entries) for name, entries in INPUTS.items()}
    asked = {key: config[key] for key in ("retry_rejected", "exports", "scaling", "model_sha256")}
    wanted = stale.Wanted(stamps, policy_of(config), **asked)
    is_run = runs_jobs() and not forecasts_alone()
    if is_run:
        lock_store(store)
    is_run = is_run and not folder_is_locked()
    if is_run:
        stale.restore(store, wanted, config)
    found = stale.stale_outputs(store, wanted, guard(store, config))
    if not is_run:
        found = stale.without_settings(found)
    if forecasts_alone():
        stale.require_free_tables(store, found)
    for path, why in found.items():
        if path.exists():
            print(f"lengthwise: {printable(f'{path}: {why}')}; a run makes it again", file=sys.stderr)
    if is_run:
        stale.discard_stale(store, found)
    return set(map(str, found))


def time_of_plan():
    """When the plan was made; None if there is none."""
    try:
        return os.stat(f"{STORE}/plan/jobs.tsv").st_mtime_ns
    except OSError:
        return None


def print_lock_holder(line):
    """Print after Snakemake's own lines who holds the folder's lock, unless Snakemake has got it (`--nolock`)."""
    if not LOCK_ACQUIRED:
        print(error_line(line), file=sys.stderr)


def require_own_paths():
    """Refuse a module's `prefix` and `replace_prefix`: the jobs and the store would look for their files under other paths."""
    replaced = workflow.modifier.path_modifier.replace_prefix
    for path in (STORE, *(entry["path"] for entries in INPUTS.values() for entry in entries)):
        if replaced(path) != path:
            raise LengthwiseError(
                f"{path}: the module's prefix or replace_prefix would move it; take that out, and write the paths into the "
                "module's config ('results', 'inputs')"
            )


def begin():
    """Look into the store, once in this process. Returns the outputs that have to be made again."""
    key = os.path.abspath(STORE)
    if key not in FOUND:
        FOUND[key] = dict(config), find_stale(Path(STORE))
        if runs_jobs():
            begin_run()
    elif FOUND[key][0] != config:
        raise LengthwiseError(
            f"{STORE}: two modules with different configs would share this store; name all inputs in one of them, or give "
            "one another 'results'"
        )
    return FOUND[key][1]


def begin_run():
    """Write what the jobs of this run and other commands need to know of it."""
    if folder_is_locked():
        if len(FOUND) == 1:  # one of several modules says it
            atexit.register(print_lock_holder, explain_lock(RUN_RECORD))
    elif IS_MODULE:  # no `onstart`
        record_run(RUN_RECORD)
        with suppress(LengthwiseError):  # the jobs that need the checkpoint say so
            note_new_time(Path(STORE))
    if IS_MODULE:  # rules of the other workflow may make the inputs in this run
        record_inputs(STORE, {name: [{"path": entry["path"]} for entry in INPUTS[name]] for name in INPUTS})
    else:
        record_inputs(STORE, INPUTS)
    if wants_everything() and not IS_MODULE:  # a module says nothing at the end
        logger.addHandler(NothingToDo())


class NothingToDo(logging.Handler):
    """Prints the summary of a run for which Snakemake finds no job: it calls neither onsuccess nor onerror then."""

    def emit(self, record):
        if str(record.msg).startswith("Nothing to be done"):
            try:
                print_at_exit(success_lines())
            except (LengthwiseError, OSError) as error:
                print_at_exit([error_line(error)])


try:
    if workflow.is_main_process and not has_conda_environments():
        require_workflow()
    for path in map(Path, workflow.configfiles if workflow.is_main_process else []):
        lengthwise.config.require_distinct_keys(path)
    config.update(lengthwise.config.validate(config, SCHEMA))
    STORE = str(Path(config["results"]) / store_name(config["model"]))
    INPUTS = (not workflow.is_main_process and recorded_inputs(STORE)) or inputs_of(
        lengthwise.config.datasets(config["inputs"], may_be_made=IS_MODULE), may_be_made=IS_MODULE
    )
    require_own_paths()
    DATASETS = list(INPUTS)
    lengthwise.config.require_own_folders(DATASETS, Path(config["results"]))
    STALE = set()
    if workflow.is_main_process:
        STALE = begin()
    else:
        guard(Path(STORE), config)
except (LengthwiseError, OSError) as error:
    sys.exit(error_line(error))  # an exception would print lines of the Snakefile too


PLAN_AT_START = time_of_plan()

MANIFEST = f"{STORE}/datasets/{{dataset}}/manifest.json"
WEIGHTS = f"{STORE}/weights.json"
INDEX = f"{STORE}/datasets/{{dataset}}/index.parquet"
LOOKUP = f"{STORE}/datasets/{{dataset}}/lookup.arrow"
JOBS = f"{STORE}/plan/jobs.tsv"


wildcard_constraints:
    dataset="[A-Za-z0-9._-]+",
    job="[0-9a-f]{16}",


def force_stale():
    """Have Snakemake make again what the store calls stale, whether it has notes of it or not.

    Input functions call this, because the graph of jobs does not exist before. As `--forcerun` with these files would, but
    what the command's targets do not need is not made.
    """
    workflow.dag.forcefiles.update(STALE)


def fasta_of(wildcards):
    """The FASTA files of a dataset, in order."""
    force_stale()
    return [entry["path"] for entry in INPUTS[wildcards.dataset]]


def fasta_state(wildcards):
    """Their sizes and mtimes. The form must not change: Snakemake compares it with that of earlier runs.

    Nothing in a module, where rules of the other workflow may make the files in the same run; `find_stale` compares them.
    """
    if IS_MODULE:
        return ""
    return "; ".join(f"{entry['bytes']} bytes, {entry['mtime_ns']} ns" for entry in INPUTS[wildcards.dataset])


def checkpoint_given(wildcards):
    """The files of the checkpoint, if the config names the model by path."""
    force_stale()
    model = config["model"]
    if not is_path(model):
        return []
    return [ancient(str(path)) for path in weight_files(model)] if os.path.isdir(model) else ancient(model)


def weights_of_unknown_shape(wildcards):
    """weights.json, unless the model's name already tells its shape: then a forecast needs no download."""
    return [] if config["model"] in MODELS else ancient(WEIGHTS)


def job_records_of_all(wildcards):
    """The job records of all planned jobs."""
    checkpoints.plan.get()
    return planned_job_records(STORE)


def force_assembly(dataset):
    """After a plan of this run: have Snakemake assemble a dataset unless its manifest is of its tables.

    Another folder's run may have made the manifest. Snakemake's notes are of this folder's: by them the tables may be as they were.
    """
    if workflow.is_main_process and time_of_plan() != PLAN_AT_START:
        manifest, tables = Path(MANIFEST.format(dataset=dataset)), Path(STORE, "inputs", dataset)
        if manifest.exists() and stale.why_assembled_again(manifest.parent, read_summary(tables), load(Path(STORE))):
            workflow.dag.forcefiles.add(str(manifest))


def job_records_of_dataset(wildcards):
    """The job records of the jobs that embed sequences of a dataset."""
    checkpoints.plan.get()
    force_assembly(wildcards.dataset)
    return planned_job_records(STORE, wildcards.dataset)


def after_plan(file):
    """An input function for a file of a dataset. It asks for the plan, because Snakemake judges anew after the plan alone
    whether such a job has to run: else each new plan would repeat it."""

    def path(wildcards):
        checkpoints.plan.get()
        return file.format(dataset=wildcards.dataset)

    return path


def weights_after_plan(wildcards):
    """weights.json, once there is a plan: the study's time and requests go by it."""
    checkpoints.plan.get()
    return ancient(WEIGHTS)


def scaling_study(wildcards):
    """The study's table, unless the config leaves the study out."""
    return f"{STORE}/report/scaling.tsv" if config["scaling"] else []


def windows_compared(wildcards):
    """The table of proteins in windows beside whole ones, where the config has windows."""
    return f"{STORE}/report/windows.tsv" if config["long_sequences"]["policy"] == "window" else []


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
        except LengthwiseError as error:
            sys.exit(error_line(error))


def require_device():
    """End a local run whose device is missing. A forecast alone needs no device."""
    if not workflow.non_local_exec and workflow.is_main_process and uses_gpu() and not forecasts_alone():
        try:
            refuse_missing_gpu()
        except LengthwiseError as error:
            sys.exit(error_line(error))


def success_lines():
    """The forecast if this run made one, else the summary of the run."""
    if lines := forecast_lines_of(Path(STORE), STARTED_SECONDS, WORKING_FOLDER):
        return lines
    job_records = planned_job_records(STORE) if os.path.exists(JOBS) else []
    seconds = time.time() - STARTED_SECONDS
    return success_lines_of(Path(STORE), DATASETS, job_records, STARTED_SECONDS, seconds, WORKING_FOLDER)


def failed_jobs():
    """The jobs that failed for good. A job that was killed and whose retry succeeded is none of them."""
    jobs = [part for job in workflow.scheduler.failed for part in (job.jobs if job.is_group() else [job])]
    return [
        FailedJob(
            job.rule.name,
            dict(job.wildcards.items()),
            Path(job.log[0]),
            {name: value for name, value in job.resources.items() if name in REQUESTS and isinstance(value, int)},
        )
        for job in jobs
        if job.log and Path(job.log[0]).is_relative_to(STORE)
    ]


def failure_lines(logs):
    """Why this run's jobs failed. `logs` are Snakemake's own."""
    slurm_logs = getattr(workflow.executor_settings, "logdir", None) or ".snakemake/slurm_logs"
    texts = [Path(path).read_text(errors="replace") for path in logs if os.path.exists(path)]
    evidence = Evidence(STARTED_SECONDS, OOM_KILLS, Path(slurm_logs), "\n".join(texts))
    named = [config["weights"], *(entry["path"] for entries in INPUTS.values() for entry in entries)]
    return failure_lines_of(Path(STORE), failed_jobs(), evidence, WORKING_FOLDER, named)


def print_at_exit(lines):
    """Print lines after Snakemake's own closing lines."""
    atexit.register(print, *lines, sep="\n", file=sys.stderr)
