"""A run with streamed weights: the rows of a resident one, after kills too; and the largest model in a few gigabytes."""

import os
import signal
import time
import warnings

import psutil
import pytest
from project import Project, ShardLock, random_sequences, wait_for

from lengthwise.benchmark.weights import write_weights
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.shapes import MODELS, ModelConfig
from lengthwise.store.metrics import read_metrics
from lengthwise.system.files import read_json


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Project:
    project = Project.with_tiny_model(tmp_path_factory.mktemp("planned") / "project", a=random_sequences(250, seed=5))
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", shard_bytes=65_536)
    run = project.snakemake("results/tiny/plan/jobs.tsv")
    assert run.code == 0, run.output
    return project


def contents_of_a_run(project: Project, residency: str) -> dict[str, str]:
    run = project.snakemake("results/tiny/datasets/a/manifest.json", "--config", f"residency={residency}")
    assert run.code == 0, run.output
    records = [read_json(project.store / "jobs" / f"{job}.json") for job in project.jobs]
    assert {record["streamed"] for record in records} == {residency == "streamed"}
    return project.contents()


def test_a_streamed_run_stores_the_rows_of_a_resident_one_also_after_a_kill_between_waves(planned, tmp_path):
    expected = contents_of_a_run(planned.copy(tmp_path / "resident"), "resident")
    project = planned.copy(tmp_path / "streamed")
    assert len(project.shards_of(project.jobs[0])) > 4
    lock = ShardLock(project, project.jobs[0])
    process = project.begin("results/tiny/datasets/a/manifest.json", "--config", "residency=streamed")
    wait_for(lambda: lock.has() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lock.open()
    assert project.snakemake("--unlock").code == 0
    assert contents_of_a_run(project, "streamed") == expected


def test_a_job_that_is_killed_within_a_wave_goes_on(tmp_path):
    planned = Project.with_tiny_model(tmp_path / "planned", a=random_sequences(250, seed=5, longest=120))
    write_random(planned.folder / "tiny.pt", ModelConfig(12, 320, 20))  # a wave takes seconds
    planned.configure(inputs=["in/*.fasta"], model="tiny.pt", shard_bytes=1_048_576)
    run = planned.snakemake("results/tiny/plan/jobs.tsv")
    assert run.code == 0, run.output
    expected = contents_of_a_run(planned.copy(tmp_path / "resident"), "resident")
    project, computed = planned.copy(tmp_path / "streamed"), []
    process = project.begin("results/tiny/datasets/a/manifest.json", "--config", "residency=streamed")

    def is_within_a_wave() -> bool:
        """Whether the job has computed for a while since its shards were begun."""
        if len(list(project.store.glob("shards/*/.*.tmp"))) > 1:
            computed.extend(psutil.Process(job).cpu_times().user for job in project.script_processes())
        return bool(computed) and computed[-1] > computed[0] + 0.3

    wait_for(lambda: is_within_a_wave() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log = project.store / "logs" / "embed" / f"{project.jobs[0]}.log"
    _, compared, later = log.read_text().partition("compared with fair-esm")  # the first shard's rows
    assert compared
    assert "a wave of" not in later
    assert len(list(project.store.glob("shards/*/.*.tmp"))) > 1
    assert len(project.shards()) == 1
    assert project.snakemake("--unlock").code == 0
    assert contents_of_a_run(project, "streamed") == expected
    assert "a wave of" in log.read_text()  # else the engine says it in other words


@pytest.mark.huge
def test_15b_embeds_a_few_proteins_in_six_gigabytes(tmp_path):
    """On a CPU. Its layers share one layer's weights in the file, as 30 GB would take minutes to make."""
    project = Project.with_tiny_model(tmp_path / "project", a=[b"MKTAYIAKQRQISFVKSHFSRQ" * n for n in (1, 2, 3)])
    write_weights(project.folder / "15b.pt", MODELS["esm2_t48_15B_UR50D"])
    project.configure(inputs=["in/*.fasta"], model="15b.pt", device="cpu", residency="streamed")
    began = time.monotonic()
    run = project.snakemake(timeout=3_600)
    assert run.code == 0, run.output
    seconds = time.monotonic() - began
    peak_bytes = read_metrics((project.folder / "results" / "15b").glob("metrics/*/*.parquet"))["peak_rss_bytes"].max()
    warnings.warn(f"15B, 132 residues on a CPU: {seconds:.0f} s, {peak_bytes / 1e9:.2f} GB", stacklevel=1)
    assert peak_bytes < 6e9
