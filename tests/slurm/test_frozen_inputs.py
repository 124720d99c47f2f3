"""Inputs are frozen when a run begins: jobs on nodes parse the workflow again, and what comes or moves disturbs none.

The runs go side by side before the first test. They are small: each protein is a job.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from project import Run, of_file, random_sequences, second_folder, served

from slurm import Cluster, ClusterProject, Submission, wait_until

pytestmark = pytest.mark.timeout(1800)
INPUTS = {"a": random_sequences(2, seed=1), "b": random_sequences(1, seed=2)}
LATE = [*INPUTS["a"][:1], *random_sequences(1, seed=3)]
# A whole run: how many jobs each rule has.
JOBS = {"ingest": 2, "plan": 1, "embed": 3, "assemble": 2, "export_parquet": 2, "summarize": 1}
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
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", device="cpu", job_minutes=1e-9, exports=["parquet"])
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
    return Twice(project, first, states, datasets, rows, shards, project.submit().wait())


def wait_for_ingest(submission: Submission, dataset: str) -> None:
    summary = submission.project.store / "inputs" / dataset / "summary.json"
    wait_until(lambda: summary.exists() or submission.process.poll() is not None, f"{dataset} is ingested")


def moved(cluster: Cluster, folder: Path) -> Twice:
    """Each input is moved once it is ingested, and moved back after the run."""
    project = new_project(folder)
    submission = project.submit()
    places = {project.folder / f"in/{name}.fasta": project.folder / f"{name}.moved" for name in INPUTS}
    for place, elsewhere in places.items():
        wait_for_ingest(submission, place.stem)
        place.rename(elsewhere)
    assert not (project.store / "plan/jobs.tsv").exists()

    def back() -> None:
        for place, elsewhere in places.items():
            place.parent.mkdir(exist_ok=True)  # Snakemake removes the empty folder
            elsewhere.rename(place)

    return twice(cluster, submission, back)


def added_before_the_plan(cluster: Cluster, folder: Path) -> Twice:
    project = new_project(folder)
    submission = project.submit()
    for name in INPUTS:
        wait_for_ingest(submission, name)
    project.write_fasta("late", LATE)
    assert not (project.store / "plan/jobs.tsv").exists()
    return twice(cluster, submission)


def added_after_the_plan(cluster: Cluster, folder: Path) -> Twice:
    project = new_project(folder)
    queue = Queue(cluster, project)
    queue.wait()
    project.write_fasta("late", LATE)
    queue.release()
    return twice(cluster, queue.submission)


@dataclass
class TwoFolders:
    """A run in a second folder over the store of a run whose jobs are queued; and that run again, alone."""

    one: ClusterProject
    two: ClusterProject
    process: int  # the first run's
    refused: Submission
    states: set[str]  # of the first run's jobs, after the refusal
    first: Run
    shards: dict[str, tuple[int, int]]  # after the first run
    alone: Run


def two_folders(cluster: Cluster, folder: Path) -> TwoFolders:
    one = new_project(folder)
    queue = Queue(cluster, one)
    queue.wait()
    two = second_folder(one, folder / "two", c=LATE)
    two.configure(inputs=["in/*.fasta"], model="tiny.pt", device="cpu", job_minutes=1e-9)
    refused = two.submit()
    refused.wait()
    states = queue.states()
    queue.release()
    first, shards = queue.submission.wait(), one.shards()
    return TwoFolders(one, two, queue.submission.process.pid, refused, states, first, shards, two.submit().wait())


SCENARIOS = (moved, added_before_the_plan, added_after_the_plan, two_folders)


@pytest.fixture(scope="module")
def ends_here(cluster, tmp_path_factory) -> Iterator[dict[str, Future]]:
    with ThreadPoolExecutor() as pool:
        yield {s.__name__: pool.submit(s, cluster, tmp_path_factory.mktemp(s.__name__)) for s in SCENARIOS}


@pytest.fixture(params=["moved", "added_before_the_plan", "added_after_the_plan"])
def disturbed(request, ends_here) -> Twice:
    return ends_here[request.param].result()


@pytest.fixture(params=["added_before_the_plan", "added_after_the_plan"])
def added(request, ends_here) -> Twice:
    return ends_here[request.param].result()


def test_a_run_completes_and_no_job_on_a_node_is_disturbed(disturbed):
    assert disturbed.first.code == 0, disturbed.first.output
    assert disturbed.states == COMPLETED
    assert "Records     3 = 3 accepted + 0 duplicate + 0 rejected" in disturbed.first.output


def test_planned_datasets_are_complete_and_are_their_files(disturbed):
    assert disturbed.datasets == set(INPUTS)
    assert disturbed.served == {name: of_file(disturbed.project.folder / f"in/{name}.fasta") for name in INPUTS}


def test_an_input_that_was_moved_back_costs_nothing(ends_here):
    moved = ends_here["moved"].result()
    assert (moved.second.code, moved.second.rules) == (0, Counter()), moved.second.output
    assert moved.project.shards() == moved.shards


def test_an_added_file_waits_for_the_next_run(added):
    assert "late" not in added.datasets
    assert added.second.code == 0, added.second.output
    assert (added.second.rules["ingest"], added.second.rules["embed"]) == (1, 1)
    assert served(added.project, "late") == of_file(added.project.folder / "in/late.fasta")
    assert len(added.project.shards()) == len(added.shards) + 1
    assert added.shards.items() <= added.project.shards().items()


def test_a_second_folders_run_is_refused_while_jobs_are_queued(ends_here):
    end = ends_here["two_folders"].result()
    assert end.refused.process.returncode == 1
    (line,) = set(Run(1, end.refused.output).errors)
    for words in (f"process {end.process}", f"folder {end.one.folder}", "at work in this store: let it finish"):
        assert words in line
    assert "SLURM jobid" not in end.refused.output
    assert end.states == {"PENDING"}


def test_the_refusal_costs_neither_run_anything(ends_here):
    end = ends_here["two_folders"].result()
    assert (end.first.code, end.alone.code) == (0, 0), end.first.output + end.alone.output
    assert end.alone.rules["embed"] == 1
    assert end.shards.items() <= end.one.shards().items()
    for name, folder in (("a", end.one), ("b", end.one), ("c", end.two)):
        assert served(end.one, name) == of_file(folder.folder / f"in/{name}.fasta")
