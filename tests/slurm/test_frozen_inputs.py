"""Inputs are frozen when a run begins: jobs on nodes parse the workflow again, and what comes or moves disturbs none.

The runs go side by side before the first test. They are small: each protein is a job.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from project import Project, Run, of_file, random_sequences, second_folder, served

from slurm import Cluster, ClusterProject, Submission, wait_until

pytestmark = pytest.mark.timeout(1800)
INPUTS = {"a": random_sequences(1, seed=1), "b": random_sequences(1, seed=2)}
LATE, SECOND = ([*INPUTS["a"][:1], *random_sequences(1, seed=seed)] for seed in (3, 4))
# A whole run: how many jobs each rule has.
JOBS = {"ingest": 2, "plan": 1, "embed": 2, "assemble": 2, "summarize": 1}
COMPLETED = {rule: ["COMPLETED"] * jobs for rule, jobs in JOBS.items()}


@dataclass
class Twice:
    """A run in whose middle something happened, and the same command again."""

    project: ClusterProject
    first: Run
    states: dict[str, list[str]]  # {rule: how its SLURM jobs ended}
    datasets: set[str]  # those that the first run made or began
    served: dict[str, dict[str, bytes]]  # {dataset: {id: digest}} after the first run, of complete ones
    shards: dict[str, tuple[int, int]]  # after the first run
    second: Run
    shards_then: dict[str, tuple[int, int]]


@dataclass
class Queue:
    """A run whose jobs that embed are held in SLURM's queue."""

    cluster: Cluster
    project: ClusterProject
    submission: Submission = field(init=False)

    def __post_init__(self) -> None:
        self.submission = self.project.submit("--set-resources", "embed:slurm_extra='--hold'")

    def wait(self) -> None:
        wait_until(lambda: len(self.jobs()) == JOBS["embed"] or self.ended(), "the jobs are in the queue")

    def jobs(self) -> list[str]:
        return self.submission.slurm_jobs("rule_embed/")

    def ended(self) -> bool:
        return self.submission.process.poll() is not None

    def states(self) -> set[str]:
        return {self.cluster.show(job)["JobState"] for job in self.jobs()}

    def release(self) -> None:
        for job in self.jobs():
            self.cluster.run("scontrol", "release", job)


def new_project(folder: Path) -> ClusterProject:
    project = ClusterProject.with_tiny_model(folder / "project", **INPUTS)
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", device="cpu", job_minutes=1e-9)
    return project


def twice(cluster: Cluster, submission: Submission, and_then=lambda: None) -> Twice:
    """Wait for a run's end, and run again."""
    project, first = submission.project, submission.wait()
    states = {rule: [cluster.show(job)["JobState"] for job in submission.slurm_jobs(f"rule_{rule}/")] for rule in JOBS}
    datasets = {path.name for part in ("inputs", "datasets") for path in project.store.glob(f"{part}/*")}
    complete = {path.parent.name for path in project.store.glob("datasets/*/manifest.json")}
    rows = {name: served(project, name) for name in complete}
    shards = project.shards()
    and_then()
    second = here(project)
    return Twice(project, first, states, datasets, rows, shards, second, project.shards())


def here(project: ClusterProject) -> Run:
    """A run without SLURM: what is left to do then depends on the store alone."""
    return Project(project.folder).snakemake()


def wait_for_ingest(submission: Submission, dataset: str) -> None:
    summary = submission.project.store / "inputs" / dataset / "summary.json"
    wait_until(lambda: summary.exists() or submission.process.poll() is not None, f"{dataset} is ingested")


def before_the_plan(cluster: Cluster, folder: Path) -> Twice:
    """A file is added when the first input is ingested; each input is moved then, and moved back after the run."""
    project = new_project(folder)
    submission = project.submit()
    places = {project.folder / f"in/{name}.fasta": project.folder / f"{name}.moved" for name in INPUTS}
    for place, elsewhere in places.items():
        wait_for_ingest(submission, place.stem)
        project.write_fasta("late", LATE)  # first: Snakemake removes an empty folder
        place.rename(elsewhere)
    assert not (project.store / "plan/jobs.tsv").exists()

    def back() -> None:
        for place, elsewhere in places.items():
            elsewhere.rename(place)

    return twice(cluster, submission, back)


@dataclass
class TwoFolders:
    """A run in a second folder over the store of a run whose jobs are queued; and that run again, alone."""

    one: Twice
    two: ClusterProject
    process: int  # the first run's
    refused: Submission
    states: set[str]  # of the first run's jobs, after the refusal
    alone: Run
    shards: dict[str, tuple[int, int]]  # before that run


def after_the_plan(cluster: Cluster, folder: Path) -> TwoFolders:
    """While the jobs of the first folder's run are queued, a file is added to it, and a second folder's run comes."""
    one = new_project(folder)
    queue = Queue(cluster, one)
    queue.wait()
    one.write_fasta("late", LATE)
    two = second_folder(one, folder / "two", c=SECOND)
    two.configure(inputs=["in/*.fasta"], model="tiny.pt", device="cpu", job_minutes=1e-9)
    refused = two.submit()
    refused.wait()
    states = queue.states()
    queue.release()
    end, shards = twice(cluster, queue.submission), one.shards()
    return TwoFolders(end, two, queue.submission.process.pid, refused, states, here(two), shards)


SCENARIOS = (before_the_plan, after_the_plan)


@pytest.fixture(scope="module")
def ends_here(cluster, tmp_path_factory) -> Iterator[dict[str, Future]]:
    with ThreadPoolExecutor() as pool:
        yield {s.__name__: pool.submit(s, cluster, tmp_path_factory.mktemp(s.__name__)) for s in SCENARIOS}


@pytest.fixture(params=["before_the_plan", "after_the_plan"])
def disturbed(request, ends_here) -> Twice:
    end = ends_here[request.param].result()
    return end.one if isinstance(end, TwoFolders) else end


def test_a_run_completes_and_no_job_on_a_node_is_disturbed(disturbed):
    assert disturbed.first.code == 0, disturbed.first.output
    assert disturbed.states == COMPLETED
    assert "Records     2 = 2 accepted + 0 duplicate + 0 rejected" in disturbed.first.output


def test_planned_datasets_are_complete_and_are_their_files(disturbed):
    assert disturbed.datasets == set(INPUTS)
    assert disturbed.served == {name: of_file(disturbed.project.folder / f"in/{name}.fasta") for name in INPUTS}


def test_an_added_file_waits_for_the_next_run_to_which_those_moved_back_cost_nothing(disturbed):
    assert "late" not in disturbed.datasets
    assert disturbed.second.code == 0, disturbed.second.output
    assert (disturbed.second.rules["ingest"], disturbed.second.rules["embed"]) == (1, 1)
    assert served(disturbed.project, "late") == of_file(disturbed.project.folder / "in/late.fasta")
    assert len(disturbed.shards_then) == len(disturbed.shards) + 1
    assert disturbed.shards.items() <= disturbed.shards_then.items()


def test_a_second_folders_run_is_refused_while_jobs_are_queued(ends_here):
    end = ends_here["after_the_plan"].result()
    assert end.refused.process.returncode == 1
    (line,) = set(Run(1, end.refused.output).errors)
    for words in (f"process {end.process}", f"folder {end.one.project.folder}", "at work in this store: let it finish"):
        assert words in line
    assert "SLURM jobid" not in end.refused.output
    assert end.states == {"PENDING"}


def test_the_refusal_costs_neither_run_anything(ends_here):
    end = ends_here["after_the_plan"].result()
    one, two = end.one.project, end.two
    assert (end.one.first.code, end.alone.code) == (0, 0), end.one.first.output + end.alone.output
    assert end.alone.rules["embed"] == 1
    assert end.shards.items() <= one.shards().items()
    for name, project in (("a", one), ("b", one), ("c", two)):
        assert served(one, name) == of_file(project.folder / f"in/{name}.fasta")
