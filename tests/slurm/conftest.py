"""A real SLURM on this machine; the scenarios run on it side by side, and the tests look at how they ended."""

import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import scenarios
from project import ROOT

from slurm import SCRIPT, Cluster, ClusterProject, ControllerCrashedError, Submission


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """SLURM, started here where LENGTHWISE_NEEDS_SLURM is set; elsewhere the tests are skipped."""
    why = None
    assert "PYTEST_XDIST_WORKER" not in os.environ or "LENGTHWISE_NEEDS_SLURM" not in os.environ, (
        "one cluster: use -n 0"
    )
    if "LENGTHWISE_NEEDS_SLURM" not in os.environ:
        why = "set LENGTHWISE_NEEDS_SLURM=1: several minutes of two cores"
    elif not (os.geteuid() == 0 and shutil.which("slurmctld")):
        why = f"needs root and SLURM: run {SCRIPT.relative_to(ROOT)} install"
    else:
        started = subprocess.run([SCRIPT, "start"], capture_output=True, text=True)
        if started.returncode:
            why = f"SLURM did not start: {started.stderr.strip().splitlines()[-1]}"
    if why:
        assert "LENGTHWISE_NEEDS_SLURM" not in os.environ, why
        warnings.warn(f"NOTHING WAS TESTED ON SLURM: {why}", stacklevel=1)
        pytest.skip(why)
    yield Cluster()
    for submission in Submission.begun:
        submission.process.kill()  # if a scenario came to no end
    end_processes_in(tmp_path_factory.getbasetemp())
    subprocess.run([SCRIPT, "stop"], check=True)


@pytest.fixture(scope="session")
def plan(cluster, tmp_path_factory) -> ClusterProject:
    return scenarios.planned(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="session")
def ends(cluster, plan, tmp_path_factory) -> dict[str, Future]:
    """What each scenario comes to, begun all at once: most of their time is waiting."""

    def project(name: str) -> ClusterProject:
        return ClusterProject(plan.copy(tmp_path_factory.mktemp(name) / "project").folder)

    with ThreadPoolExecutor() as pool:
        ends = {
            "undisturbed": pool.submit(scenarios.undisturbed, project("undisturbed")),
            "whole": pool.submit(scenarios.whole, cluster, tmp_path_factory.mktemp("whole")),
            "login": pool.submit(scenarios.login, cluster, project("login")),
            "last_ends": pool.submit(scenarios.last_ends, cluster, project("last_ends")),
        }
        others = list(ends.values())

        def faults() -> scenarios.Faults:
            return scenarios.faults(cluster, project("faults"), tmp_path_factory.mktemp("tools"), others)

        def faults_or_again() -> scenarios.Faults:
            try:
                return faults()
            except (ControllerCrashedError, subprocess.CalledProcessError) as crash:
                if not Cluster.crashed():  # SLURM's own fault, and none of those that are tested
                    raise
                warnings.warn(f"SLURM's controller crashed, and the faults are made again: {crash}", stacklevel=1)
                for submission in Submission.begun:
                    submission.process.kill()
                cluster.start()
                cluster.run("scancel", "--user=root")
                return faults()

        ends["faults"] = pool.submit(faults_or_again)
        yield ends
        for submission in Submission.begun:
            submission.process.kill()  # else the pool waits for it


@pytest.fixture(scope="session")
def by_group(cluster, plan, ends, tmp_path_factory) -> scenarios.ByGroup:
    """After all others: SLURM is started again, with memory enforced by control groups."""
    for end in ends.values():
        end.exception()
    if why := cluster.enforce_memory_by_groups():
        warnings.warn(f"A KILL BY A CONTROL GROUP WAS NOT TESTED ON SLURM: {why}", stacklevel=1)
        pytest.skip(why)
    return scenarios.by_group(ClusterProject(plan.copy(tmp_path_factory.mktemp("by_group") / "project").folder))


def end_processes_in(folder: Path) -> None:
    """Kill what a job left: here nothing tracks its processes, and a Snakemake that got a SIGTERM may wait for ever."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if Path(os.readlink(link)).is_relative_to(folder):
                os.kill(int(link.parent.name), signal.SIGKILL)


@pytest.fixture
def undisturbed(ends) -> dict[str, str]:
    return ends["undisturbed"].result()
