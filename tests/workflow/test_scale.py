"""A store of many jobs, by hand (huge) as many as a plan may have: what a run that has nothing to do costs."""

import functools
import os
import re
import time
import warnings

import pytest
from project import Project, random_sequences

from lengthwise.jobs import embed_job
from lengthwise.plan.cuts import MAX_JOBS
from lengthwise.plan.planner import read_jobs
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.system.files import read_json, write_json


@pytest.fixture(scope="module", params=[MAX_JOBS // 10, pytest.param(MAX_JOBS, marks=pytest.mark.huge)])
def jobs(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def planned(tmp_path_factory, jobs) -> Project:
    project = Project.with_tiny_model(tmp_path_factory.mktemp("planned") / "project", a=random_sequences(jobs, seed=5))
    # Jobs so short that each holds one protein.
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", job_minutes=1e-9)
    run = project.snakemake("results/tiny/plan/jobs.tsv")
    assert run.code == 0, run.output
    return project


# Snakemake, and at its end the most memory that it had.
WITH_PEAK = """if True:
    import atexit, pathlib, re, runpy
    status = pathlib.Path("/proc/self/status")
    atexit.register(lambda: print(re.search("VmHWM.*", status.read_text())[0]))
    runpy.run_module("snakemake", run_name="__main__", alter_sys=True)
"""


def test_a_dry_run_with_every_job_to_do_takes_under_a_minute_and_a_gigabyte(planned, jobs, monkeypatch):
    python, _, _, *arguments = planned.command("--dry-run", "--quiet", "rules")
    monkeypatch.setattr(planned, "command", lambda: [python, "-c", WITH_PEAK, *arguments])
    started = time.monotonic()
    run = planned.snakemake()
    seconds = time.monotonic() - started
    assert re.search(rf"^embed +{jobs}$", run.output, re.MULTILINE), run.output[-2000:]
    gigabytes = int(re.search(r"^VmHWM:\s+(\d+) kB", run.output, re.MULTILINE)[1]) * 1024 / 1e9
    warnings.warn(f"{jobs} jobs, all to do (dry run): {seconds:.1f} s, {gigabytes:.2f} GB", stacklevel=1)
    assert seconds < 60
    assert gigabytes < 1


@pytest.fixture(scope="module")
def large(planned, jobs, tmp_path_factory):
    project = planned.copy(tmp_path_factory.mktemp("large") / "project")
    names = read_jobs(project.store / "plan" / "jobs.tsv")["job"]
    assert len(names) == jobs
    receipt = project.store / "weights.json"
    write_json(receipt, read_json(receipt) | {"path": str(project.folder / "tiny.pt")})
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # without Snakemake's second, a load of the model and a disk's wait for each
        patch.setattr(embed_job, "open_engine", functools.cache(embed_job.open_engine))
        patch.setattr(os, "fsync", lambda _: None)
        for job in names:
            embed_job.embed_job(project.store, work_order_path(project.store, job), job_record_path(project.store, job))
    run = project.snakemake()
    assert run.code == 0, run.output
    assert run.rules["embed"] == 0
    return project


def test_nothing_to_do_takes_under_a_minute(large, jobs):
    for arguments in ([], ["--dry-run"]):
        started = time.monotonic()
        run = large.snakemake(*arguments)
        seconds = time.monotonic() - started
        assert "Nothing to be done" in run.output
        warnings.warn(f"{jobs} jobs, nothing to do{' (dry run)' if arguments else ''}: {seconds:.1f} s", stacklevel=1)
        assert seconds < 60
