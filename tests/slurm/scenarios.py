"""What happens to runs on SLURM. Each scenario takes a run through it, and returns what is left to look at."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pandas as pd
from project import ROOT, Project, Run, random_sequences

from lengthwise.maintain.progress import read_progress
from lengthwise.plan.planner import read_jobs
from lengthwise.plan.record import plan_record_path
from lengthwise.system.files import facts, read_json, write_json
from slurm import Cluster, ClusterProject, Gate, Submission, wait_until

DONE = "results/tiny/datasets/a/manifest.json"
PAGE = ROOT / "docs" / "cluster.md"
FAULTS = ("term", "kill", "cancel", "requeue", "walltime", "memory", "unknown", "controller", "node")
FORECAST_MINUTES = 0.0634 / 60  # of all sequences
LATE_SECONDS = 4.0
# SLURM 22.05's controller crashed where a job began half a second after its node had come back, and not where it was two seconds.
RETURN_SECONDS = 5.0
# How a job ends without a word of its own, where there is no retry.
LAST_ENDS = ("memory", "walltime", "kill", "cancel")
TOO_LITTLE_MB = 400  # of a job's processes, each with the pages that it shares
TOO_LITTLE_GROUP_MB = 300  # of a control group, which counts a page once
Shards = dict[str, tuple[int, int]]


def planned(folder: Path) -> ClusterProject:
    """A project with a job of several shards for each fault, planned on this machine and not begun."""
    project = ClusterProject.with_tiny_model(folder / "project", a=random_sequences(420, seed=7, longest=200))
    project.configure(
        inputs=["in/*.fasta"],
        model="tiny.pt",
        device="cpu",
        shard_bytes=65_536,
        job_minutes=FORECAST_MINUTES / len(FAULTS),
    )
    run = Project(project.folder).snakemake("results/tiny/plan/jobs.tsv")
    assert run.code == 0, run.output
    assert len(project.jobs_with_a_middle()) >= len(FAULTS)
    for job in project.jobs:
        change_plan(project, job, runtime_minutes=30)  # they wait at gates
    return project


def undisturbed(project: ClusterProject) -> dict[str, str]:
    """What the project comes to on this machine, with nobody in its way."""
    code = """if True:
        import sys
        from pathlib import Path
        from lengthwise.jobs.embed_job import embed_job
        store = Path("results/tiny")
        for job in sys.argv[1:]:
            embed_job(store, store / "plan" / "jobs" / f"{job}.parquet", store / "jobs" / f"{job}.json")
    """
    subprocess.run([sys.executable, "-c", code, *project.jobs], check=True, cwd=project.folder, env=project.environment)
    run = Project(project.folder).snakemake(DONE)
    assert run.code == 0, run.output
    assert run.rules["embed"] == 0
    return project.contents()


@dataclass
class Whole:
    """A whole run, and the same command again."""

    project: ClusterProject
    first: Run
    jobs: pd.DataFrame  # rule, and what SLURM says of each job
    second: Run


def whole(cluster: Cluster, folder: Path) -> Whole:
    """The example and 2,000 sequences, from nothing to the report; what assemble writes is seen late on the login node."""
    project = ClusterProject.with_tiny_model(folder / "project", many=random_sequences(2_000, seed=3))
    shutil.copy(ROOT / "config" / "example.fasta", project.folder / "in")
    project.configure(
        inputs=["in/*.fasta"], model="tiny.pt", device="cpu", job_minutes=3.6e-4, scaling=True, scaling_seconds=5
    )
    project.profile = the_sites_profile(folder / "profile")
    arguments = ["--slurm-status-command", "sacct"]
    with late(cluster, project.store / "datasets", folder / "on-the-node"):
        submission = project.submit(*arguments)
        first = submission.wait()
    rules = ("ingest", "plan", "embed", "scaling", "assemble", "summarize")
    jobs = pd.DataFrame(
        {"rule": rule, "id": job} | cluster.show(job)
        for rule in rules
        for job in submission.slurm_jobs(f"rule_{rule}/")
    )
    return Whole(project, first, jobs, project.submit(*arguments).wait())


def the_sites_profile(folder: Path) -> Path:
    """The shipped profile with its examples made real, and a GPU where these tests compute on the CPU."""
    folder.mkdir()
    profile = (ROOT / "workflow" / "profiles" / "slurm" / "config.yaml").read_text()
    kept, examples = profile.split("# default-resources:")
    examples = ("# default-resources:" + examples).replace("\n# ", "\n")[2:]
    (folder / "config.yaml").write_text(kept + examples.replace("gpu_model:", "gpu: 1\n    gpu_model:"))
    return folder


@contextmanager
def late(cluster: Cluster, folder: Path, on_the_node: Path) -> Iterator[None]:
    """Files that jobs write into a folder appear in it seconds later, as on a slow shared file system."""
    folder.mkdir(parents=True)
    on_the_node.mkdir()
    over = threading.Event()

    def copy() -> None:
        while not over.wait(0.1):
            for path in on_the_node.rglob("[!.]*"):
                there = folder / path.relative_to(on_the_node)
                if path.is_file() and time.time() - path.stat().st_mtime > LATE_SECONDS and not there.exists():
                    there.parent.mkdir(exist_ok=True)
                    shutil.copy2(path, there.with_name(".part"))
                    there.with_name(".part").rename(there)

    with cluster.other_files_on_the_node(folder, on_the_node):
        thread = threading.Thread(target=copy)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@dataclass
class Login:
    """A run on the login node that was killed."""

    project: ClusterProject
    progress: str
    second_at_once: Run
    without_unlock: Run
    finished_before: Shards
    dead_jobs: list[dict[str, str]]
    last: Run
    last_jobs: list[dict[str, str]]
    made: dict[str, list[int]]  # {job: how many shards each of its processes made}


def login(cluster: Cluster, project: ClusterProject) -> Login:
    """A second run beside the first; the first one's Snakemake killed; a third while a job of the first is alive."""
    jobs = project.jobs_with_a_middle()[:2]
    targets = job_records(jobs)
    gates = [Gate(project, job) for job in jobs]
    first = project.submit(*targets)
    for gate in gates:
        gate.wait()
    wait_until(
        lambda: read_progress(project.store).done_residues, "heartbeats of jobs on nodes say that residues are done"
    )
    watch = [sys.executable, "-m", "lengthwise", "progress", str(project.store), "--once"]
    progress = subprocess.run(watch, capture_output=True, text=True, check=True, env=project.environment).stdout
    second_at_once = project.submit(*targets).wait()
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.wait()
    finished_before = project.shards()
    without_unlock = project.submit(*targets).wait()
    assert project.submit("--unlock").wait().code == 0
    another_device = ["--set-resources", "embed:gpu=0", "embed:gres=gpu:a100:1"]
    last = project.submit(*targets, *another_device, "--slurm-keep-successful-logs")
    for gate in gates:
        gate.wait(processes=2)
        gate.open()
    end = last.wait()
    numbers = [run.slurm_jobs("rule_embed/") for run in (first, last)]
    for number in chain(*numbers):
        cluster.wait_for_state(number, "COMPLETED")
    dead_jobs, last_jobs = ([cluster.show(number) for number in each] for each in numbers)
    logs = project.folder / "logs" / "slurm" / "rule_embed"
    made = {
        job: [int(re.search(r"(\d+) made now", log.read_text())[1]) for log in (logs / job).iterdir()] for job in jobs
    }
    return Login(project, progress, second_at_once, without_unlock, finished_before, dead_jobs, end, last_jobs, made)


@dataclass
class LastEnds:
    """A run without retries, each of whose jobs was ended in another way."""

    project: ClusterProject
    run: Run
    names: dict[str, str]  # {how it was ended: job}

    @property
    def lines(self) -> dict[str, str]:
        """{how a job was ended: what the last lines say of it}."""
        return {end: next(line for line in self.last_lines if job in line) for end, job in self.names.items()}

    @property
    def last_lines(self) -> list[str]:
        """Those after Snakemake's own."""
        return self.run.output.rpartition("At least one job did not complete successfully.")[2].strip().splitlines()


def last_ends(cluster: Cluster, project: ClusterProject) -> LastEnds:
    """Jobs that exceed their memory and their time, that get a SIGKILL, and that are cancelled; none is tried again."""
    names = dict(zip(LAST_ENDS, project.jobs_with_a_middle(), strict=False))
    change_plan(project, names["memory"], mem_mb=TOO_LITTLE_MB)
    gates = {end: Gate(project, job) for end, job in names.items()}
    submission = project.submit(*job_records(names.values()), "--retries", "0", "--keep-going")
    for end in names.keys() - {"memory"}:  # whose job may be killed on its way to the gate
        gates[end].wait()
        (job,) = submission.slurm_jobs(f"rule_embed/{names[end]}")
        match end:
            case "walltime":
                cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
            case "cancel":
                cluster.run("scancel", job)
            case "kill":
                gates[end].kill()
    run = submission.wait()
    for gate in gates.values():
        gate.open()
    return LastEnds(project, run, names)


def job_records(jobs: Iterable[str]) -> list[str]:
    return [f"results/tiny/jobs/{job}.json" for job in jobs]


@dataclass
class ByGroup:
    """A job that a control group killed for memory, and the run after it, as the last lines advise it."""

    first: LastEnds
    advised: str
    second: Run


def by_group(project: ClusterProject) -> ByGroup:
    """A job that exceeds its memory where control groups enforce it; then with the option that the last lines name."""
    name = project.jobs_with_a_middle()[0]
    change_plan(project, name, mem_mb=TOO_LITTLE_GROUP_MB)
    run = project.submit(*job_records([name]), "--retries", "0").wait()
    first = LastEnds(project, run, {"memory": name})
    advised = re.search(r"--set-resources (\S+)", first.lines["memory"])[1]
    return ByGroup(first, advised, project.submit(*job_records([name]), "--set-resources", advised).wait())


@dataclass
class Faults:
    """A run that met one fault after the other."""

    project: ClusterProject
    end: Run
    names: dict[str, str]  # {fault: job}
    tries: dict[str, list[dict[str, str]]]  # {fault: what SLURM says of the job's tries}
    finished_before: dict[str, Shards]  # {fault: the shards that were there then}


class Disturber:
    """Does to each job of a run what is to happen to it."""

    def __init__(self, cluster: Cluster, project: ClusterProject, folder: Path):
        self.cluster, self.project = cluster, project
        self.names = dict(zip(FAULTS, project.jobs_with_a_middle(), strict=False))
        self.gates = {fault: Gate(project, job) for fault, job in self.names.items()}
        self.before: dict[str, Shards] = {}
        self.forgotten = folder / "forgotten"
        self.forgotten.write_text("none")
        change_plan(project, self.names["memory"], mem_mb=TOO_LITTLE_MB)  # as if the formula were wrong for one job
        project.first_in_path = squeue_that_forgets(folder, self.forgotten)
        partitions = folder / "partitions.yaml"
        partitions.write_text(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
        self.submission: Submission = project.submit(
            DONE, "--latency-wait", "5", "--slurm-partition-config", str(partitions)
        )

    def job_in_its_middle(self, fault: str) -> str:
        """SLURM's number of a fault's job, once it waits at its gate."""
        self.gates[fault].wait()
        self.before[fault] = self.project.shards()
        return self.numbers(fault)[-1]

    def numbers(self, fault: str) -> list[str]:
        return self.submission.slurm_jobs(f"rule_embed/{self.names[fault]}")

    def signals(self) -> None:
        for fault, how in {"term": ["--signal=TERM"], "kill": ["--signal=KILL"], "cancel": []}.items():
            self.cluster.run("scancel", *how, self.job_in_its_middle(fault))
            self.gates[fault].wait(processes=0)
            self.gates[fault].open()

    def requeue(self) -> None:
        job = self.job_in_its_middle("requeue")
        self.cluster.run("scontrol", "requeue", job)
        self.cluster.begin_now(job)
        self.gates["requeue"].open()

    def unknown_state(self) -> None:
        """squeue forgets the job, which goes on; another try of it comes to the same gate."""
        self.forgotten.write_text(self.job_in_its_middle("unknown"))
        self.gates["unknown"].wait(processes=2)
        self.forgotten.write_text("none")
        self.gates["unknown"].open()

    def controller_restart(self) -> None:
        """The job ends while there is no controller."""
        self.job_in_its_middle("controller")
        self.cluster.stop_controller()
        self.gates["controller"].open()
        self.wait_for_job_records("controller")
        self.cluster.start()

    def walltime(self) -> None:
        job = self.job_in_its_middle("walltime")
        self.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        self.cluster.wait_for_state(job, "TIMEOUT")
        self.gates["walltime"].open()

    def memory(self) -> None:
        """SLURM samples it each second: the job is held at its gate, or ends before it gets there."""
        wait_until(lambda: self.numbers("memory"), "the job that gets too little memory is submitted")
        self.cluster.wait_for_state(self.numbers("memory")[0], "FAILED")
        self.gates["memory"].open()

    def preemption_and_node_failure(self) -> None:
        """The same job, twice put back into the queue."""
        self.wait_for_job_records(*(fault for fault in FAULTS if fault != "node"))
        job = self.job_in_its_middle("node")
        self.cluster.run("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        self.cluster.begin_now(job)
        self.gates["node"].wait()
        self.cluster.kill_node()
        wait_until(lambda: "down" in self.cluster.run("sinfo", "--noheader", "--format=%T"), "the node is down")
        self.cluster.start()
        time.sleep(RETURN_SECONDS)
        self.cluster.begin_now(job)
        self.gates["node"].wait()
        self.gates["node"].open()

    def wait_for_job_records(self, *faults: str) -> None:
        for fault in faults:
            job_record = self.project.store / "jobs" / f"{self.names[fault]}.json"
            wait_until(job_record.exists, f"the job of {fault} is committed")


def faults(cluster: Cluster, project: ClusterProject, folder: Path, others: list[Future]) -> Faults:
    """One run whose jobs are terminated, killed, cancelled, requeued, preempted, too slow, too large, forgotten, and lost."""
    disturber = Disturber(cluster, project, folder)
    with ThreadPoolExecutor(2) as pool:
        beside = [pool.submit(disturber.walltime), pool.submit(disturber.memory)]
        disturber.signals()
        disturber.requeue()
        disturber.unknown_state()
        for fault in beside:
            fault.result()
    for other in others:
        other.exception()  # the node is theirs too, and a controller that is started again may take a GPU in use for two
    disturber.controller_restart()
    disturber.preemption_and_node_failure()
    end = disturber.submission.wait()
    tries = {fault: [cluster.show(job) for job in disturber.numbers(fault)] for fault in FAULTS}
    return Faults(project, end, disturber.names, tries, disturber.before)


def change_plan(project: ClusterProject, job: str, **values: int) -> None:
    """Let a job ask for something else, as if the plan had said so."""
    path = project.store / "plan" / "jobs.tsv"
    jobs = read_jobs(path)
    jobs.loc[jobs["job"] == job, list(values)] = list(values.values())
    jobs.to_csv(path, sep="\t", index=False)
    record = read_json(plan_record_path(project.store))
    record["files"][path.name] = facts(path)
    write_json(plan_record_path(project.store), record)


def squeue_that_forgets(folder: Path, forgotten: Path) -> Path:
    """A folder with a squeue that knows nothing of one job's state, which happens where accounting and queue disagree."""
    tools = folder / "tools"
    tools.mkdir()
    real = shutil.which("squeue")
    (tools / "squeue").write_text(
        f'#!/bin/sh\n{real} "$@" | sed "s/^$(cat {forgotten})|.*/$(cat {forgotten})|UNKNOWN/"\n'
    )
    (tools / "squeue").chmod(0o755)
    return tools
