"""SLURM's daemons, and projects whose workflow runs on them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from project import ROOT, Project, Run, ShardLock

SCRIPT = Path(__file__).with_name("cluster")
STATE = Path("/run/lengthwise-slurm")
SECONDS = 400  # for anything at all: machines that run tests are slow at times


class ControllerCrashedError(Exception):
    """SLURM's controller ended by itself: 22.05 does at times, when a job asks for its allocation on a node that came back."""


def wait_until(true: Callable[[], object], what: str) -> None:
    ends = time.monotonic() + SECONDS
    while not true():
        if Cluster.crashed():
            raise ControllerCrashedError(what)
        assert time.monotonic() < ends, f"this did not come true in {SECONDS} s: {what}"
        time.sleep(0.1)


class Cluster:
    """The daemons, and what one asks them."""

    stopped: ClassVar[bool] = False  # the controller, by us

    @classmethod
    def crashed(cls) -> bool:
        try:
            pid = (STATE / "slurmctld.pid").read_text().strip()
        except FileNotFoundError:
            return False
        return bool(pid) and not cls.stopped and not Path(f"/proc/{pid}").exists()

    def run(self, *command: str | Path) -> str:
        return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout

    def start(self) -> None:
        done = subprocess.run([SCRIPT, "start"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        Cluster.stopped = False

    def enforce_memory_by_groups(self) -> str | None:
        """Start again with memory limits by control groups. Why that cannot be, where it cannot."""
        done = subprocess.run([SCRIPT, "groups"], capture_output=True, text=True)
        return done.stderr.strip().splitlines()[-1] if done.returncode else None

    def pid(self, daemon: str) -> int:
        return int((STATE / f"{daemon}.pid").read_text())

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "--details", "show", "job", job)))

    def wait_for_state(self, job: str, state: str) -> None:
        wait_until(lambda: self.show(job)["JobState"] == state, f"job {job} is {state}")

    def begin_now(self, job: str) -> None:
        """Not two minutes after it was put back into the queue."""
        self.wait_for_state(job, "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop_controller(self) -> None:
        controller, Cluster.stopped = self.pid("slurmctld"), True
        os.kill(controller, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{controller}").exists(), "the controller is gone")

    def kill_node(self) -> None:
        """slurmd and all that it started, at once, as when the power goes."""
        daemon = self.pid("slurmd")
        steps = [int(p) for p in subprocess.run(["pgrep", "slurmstepd"], capture_output=True, text=True).stdout.split()]
        for process in (daemon, *steps, *(child for step in steps for child in descendants(step))):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    @contextmanager
    def other_files_on_the_node(self, folder: Path, instead: Path) -> Iterator[None]:
        """While this lasts, jobs see another folder in this one's place."""
        inside = ["nsenter", f"--target={self.pid('slurmd')}", "--mount"]
        self.run(*inside, "mount", "--bind", instead, folder)
        try:
            yield
        finally:
            self.run(*inside, "umount", folder)


def descendants(process: int) -> list[int]:
    found = []
    for child in subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split():
        found += [int(child), *descendants(int(child))]
    return found


class Submission:
    """A snakemake that submits to SLURM, in a process of its own."""

    begun: ClassVar[list["Submission"]] = []

    def __init__(self, project: "ClusterProject", *arguments: str):
        self.begun.append(self)
        self.project, self.log = project, project.folder / f"submission-{time.monotonic_ns()}.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                project.command(*arguments),
                cwd=project.folder,
                env=project.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> Run:
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"not done after {SECONDS} s:\n{self.output}") from None
        return Run(self.process.returncode, self.output)

    def slurm_jobs(self, path: str) -> list[str]:
        """SLURM's numbers of jobs, in the order of their submission; a path is `rule_embed/<job>`, or its beginning."""
        return re.findall(rf"SLURM jobid (\d+) \(log: \S*/{path}", self.output)


class ClusterProject(Project):
    """A project with the tiny model on the CPU; its jobs ask for GPUs as a site's would that has some."""

    first_in_path: Path | None = None
    profile = ROOT / "workflow" / "profiles" / "slurm"

    def command(self, *arguments: str) -> list[str]:
        return [
            *(sys.executable, Path(__file__).with_name("impatient.py"), *arguments),
            *("--workflow-profile", self.profile, "--set-threads", "embed=1", "scaling=1"),
            *("--snakefile", self.checkout / "workflow" / "Snakefile", "--directory", self.folder),
        ]

    @property
    def environment(self) -> dict[str, str]:
        environment = super().environment
        environment.pop("SLURM_CONF", None)  # the one that is running
        if self.first_in_path:
            environment["PATH"] = f"{self.first_in_path}:{environment['PATH']}"
        return environment

    def submit(self, *arguments: str) -> Submission:
        return Submission(self, *arguments)

    def jobs_with_a_middle(self) -> list[str]:
        return [job for job in self.jobs if len(self.shards_of(job)) > 3]


class Gate(ShardLock):
    """The lock of a shard, at which jobs on nodes are waited for as long as the controller lives."""

    def wait(self, processes: int = 1) -> None:
        wait_until(lambda: self.has(processes), f"{processes} processes wait at {self.path}")
