"""What jobs ask a scheduler for, against what they use."""

import subprocess
import sys

import pandas as pd
import pytest

from lengthwise.esm2 import residency
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MODELS, MOST_AT_ONCE
from lengthwise.plan import throughput
from lengthwise.plan.cuts import Sizes
from lengthwise.plan.job_requests import job_requests
from lengthwise.plan.planner import plan, read_jobs
from lengthwise.plan.process import PROCESS_BYTES
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.store.settings import make

CONFIG = {"model": "m", "precision": "auto", "layers": [-1], "default_layer": "auto"}
CONFIG |= {"storage_dtype": "float16", "outputs": ["residue"]}


def settings_of(model: str, device: str) -> dict:
    shape = MODELS[model]
    receipt = {"sha256": "0" * 64, "random_weights": False, **vars(shape)}
    return make(CONFIG | {"device": device}, receipt, device)


def request_of(settings: dict, checkpoint_bytes: float = 2.6e9, residency: str = "auto", **job) -> dict:
    usual = {
        "sequences": 10_000,
        "residues": 3_000_000,
        "longest": 1_000,
        "forecast_bytes": 8e9,
        "forecast_seconds": 1200.0,
    }
    return job_requests(pd.DataFrame([usual | job]), settings, int(checkpoint_bytes), residency).iloc[0].to_dict()


def test_a_plan_says_what_each_job_asks_for(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(60))
    jobs = store.plan(job_seconds=4e-4, shard_bytes=8_000)
    assert len(jobs) > 1
    columns = ["mem_mb", "disk_mb", "runtime_minutes"]
    assert (read_jobs(store.jobs_tsv)[columns] >= 1).all(axis=None)
    pd.testing.assert_frame_equal(read_jobs(store.jobs_tsv)[columns], jobs[columns], check_index_type=False)


@pytest.mark.parametrize(
    ("more", "grows"),
    [
        ({"checkpoint_bytes": 30e9}, {"mem_mb", "runtime_minutes"}),
        ({"residues": 10**9}, {"mem_mb"}),
        ({"longest": 100_000}, {"mem_mb"}),
        ({"forecast_bytes": 80e9}, {"disk_mb"}),
        ({"forecast_seconds": 9000.0}, {"runtime_minutes"}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_of_something_asks_for_more_of_what_it_takes(device, more, grows):
    settings = settings_of("esm2_t33_650M_UR50D", device)
    usual, larger = request_of(settings), request_of(settings, **more)
    assert {name for name in usual if larger[name] > usual[name]} == grows


@pytest.mark.parametrize(
    ("model", "device", "share"),
    [
        ("esm2_t36_3B_UR50D", "cpu", 0.2),
        ("esm2_t36_3B_UR50D", "cuda", 0.8),
        ("esm2_t48_15B_UR50D", "cpu", 0.15),
        ("esm2_t48_15B_UR50D", "cuda", 0.4),
    ],
)
def test_streamed_weights_ask_for_less_memory(model, device, share):
    settings, checkpoint_bytes = settings_of(model, device), 2 * MODELS[model].parameters
    resident = request_of(settings, checkpoint_bytes)
    streamed = request_of(settings, checkpoint_bytes, "streamed")
    assert streamed["mem_mb"] < share * resident["mem_mb"]
    assert streamed | {"mem_mb": 0} == resident | {"mem_mb": 0}


@pytest.mark.parametrize("cores", [1, 2, MOST_AT_ONCE])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D", "esm2_t48_15B_UR50D"])
def test_what_a_streamed_job_asks_for_has_room_for_a_wave_with_a_batch_for_each_core(model, precision, cores):
    shape, itemsize = MODELS[model], 4 if precision == "float32" else 2
    settings = settings_of(model, "cpu") | {"precision": precision}
    job = {"sequences": 10_000, "residues": 3_000_000}
    free = 1e6 * request_of(settings, 2 * shape.parameters, "streamed", **job)["mem_mb"] - PROCESS_BYTES["cpu"]
    batch_tokens = residency.streamed_batch_tokens(shape, itemsize, cores)
    beside = residency.computing_bytes(shape, "cpu", itemsize, cores, batch_tokens)
    room = residency.room_for_wave(shape, "cpu", itemsize, free, beside)
    assert room > cores * batch_tokens * (residency.sums_bytes(shape) + 2 * shape.embed_dim)


def test_a_store_asks_for_room_for_what_it_writes():
    assert request_of(settings_of("esm2_t33_650M_UR50D", "cuda"))["disk_mb"] >= 8_000


PEAK = """
import sys
from pathlib import Path
from lengthwise.jobs.embed_job import embed_job
embed_job(*map(Path, sys.argv[2:]), residency=sys.argv[1])
lines = dict(line.split(":") for line in open("/proc/self/status"))
print(int(lines["VmHWM"].split()[0]) / 1e3)
"""


@pytest.mark.parametrize(
    ("longest", "residency"),
    [(60, "resident"), (2 * AUTO_BATCH_TOKENS["cpu"], "resident"), (60, "streamed")],
    ids=["batches", "one long protein", "streamed"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_stays_within_the_memory_that_it_asks_for(small_store, random_proteins, longest, residency):
    store = small_store()
    store.ingest("a", random_proteins(800) | {"long": "M" * longest})
    (job,) = store.plan(shard_bytes=1 << 20, residency=residency)["job"]
    paths = store.path, work_order_path(store.path, job), job_record_path(store.path, job)
    done = subprocess.run([sys.executable, "-c", PEAK, residency, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (asked,) = store.jobs["mem_mb"]
    assert 0.25 * asked < float(done.stdout) < 0.9 * asked  # most of a small request is PROCESS_BYTES


def test_forecasts_go_by_what_finished_jobs_took_once_that_is_enough(small_store, random_proteins, monkeypatch):
    store = small_store()
    store.ingest("a", random_proteins(60, shortest=300, longest=300))
    store.plan()
    (job_record,) = store.embed_all()
    store.ingest("b", random_proteins(600, shortest=300, longest=300, prefix="other"))
    sequences = {"b": store.inputs("b") / "sequences.parquet"}

    def forecast() -> float:
        sizes = Sizes(1200.0, 1 << 30, throughput.slowdown(store.path, store.settings))
        jobs = plan(store.path, sequences, sizes, store.jobs_tsv)
        return jobs["forecast_seconds"].sum()

    assumed = forecast()
    monkeypatch.setattr(throughput, "ENOUGH_SECONDS", 0.0)
    measured = forecast()
    assert assumed != pytest.approx(10 * job_record["embed_seconds"], rel=0.01)
    assert measured == pytest.approx(10 * job_record["embed_seconds"], rel=0.2)


def test_a_slower_device_gets_shorter_jobs(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(60))
    sequences = {"a": store.inputs("a") / "sequences.parquet"}
    assumed = plan(store.path, sequences, Sizes(4e-4, 1 << 30), store.jobs_tsv)
    slower = plan(store.path, sequences, Sizes(4e-4, 1 << 30, slowdown=3.0), store.jobs_tsv)
    assert len(slower) == len(assumed)  # existing work orders keep their jobs
    for work_order in (store.path / "plan" / "jobs").glob("*.parquet"):
        work_order.unlink()
    slower = plan(store.path, sequences, Sizes(4e-4, 1 << 30, slowdown=3.0), store.jobs_tsv)
    assert len(slower) == pytest.approx(3 * len(assumed), rel=0.2)
