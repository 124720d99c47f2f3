"""What the study takes of a run: time by what the embedding took, memory by what jobs that embed ask for."""

import pytest

from lengthwise.esm2.shapes import MODELS
from lengthwise.report.study import budget
from lengthwise.store.paths import job_record_path
from lengthwise.system.files import write_json


@pytest.fixture
def store(tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "jobs").mkdir()
    return tmp_path


def plan(store, *jobs):
    lines = [f"job{i}\ta\t{seconds}\t{mem_mb}" for i, (seconds, mem_mb) in enumerate(jobs)]
    (store / "plan" / "jobs.tsv").write_text("\n".join(["job\tdatasets\tforecast_seconds\tmem_mb", *lines]) + "\n")


def settings(model, precision="float32", device="cpu"):
    shape = MODELS[model]
    sizes = {"num_layers": shape.num_layers, "embed_dim": shape.embed_dim, "attention_heads": shape.attention_heads}
    return {"precision": precision, "device": device} | sizes


@pytest.mark.parametrize(
    ("embedding", "with_report"),
    [(0, 15), (17, 15), (60, 15), (100, 25), (200, 50), (10_000, 65)],
)
def test_study_and_report_take_a_quarter_of_the_embedding_or_fifteen_seconds(store, embedding, with_report):
    plan(store, (embedding / 2, 1), (embedding / 2, 1))
    assert budget.auto_seconds(store, "cpu") == pytest.approx(with_report - budget.REPORT_SECONDS)


def test_finished_jobs_count_with_what_they_took_and_damaged_records_with_their_forecast(store):
    plan(store, (1_000, 1), (100, 1), (40, 1))
    write_json(job_record_path(store, "job0"), {"load_seconds": 10.0, "embed_seconds": 50.0})
    job_record_path(store, "job1").write_text("{")
    assert budget.auto_seconds(store, "cpu") == pytest.approx((60 + 100 + 40) / 4 - budget.REPORT_SECONDS)


def test_without_a_plan_the_study_is_short(store):
    assert budget.auto_seconds(store, "cuda") == budget.LEAST_SECONDS - budget.REPORT_SECONDS


def test_the_study_asks_for_what_it_takes(store):
    plan(store, (10, 3_000))
    parameters = MODELS["esm2_t33_650M_UR50D"].parameters
    asked = budget.asked_mb(store, settings("esm2_t33_650M_UR50D"))
    assert asked == pytest.approx(1_000 + 4_000 + 8 * parameters / 1e6 / 0.9, abs=2)
    assert budget.asked_mb(store, settings("esm2_t6_8M_UR50D")) < 6_000
    assert budget.asked_mb(store, settings("esm2_t48_15B_UR50D", "float16", "cuda")) == 12_000


def test_a_study_that_will_be_skipped_asks_for_little(store):
    plan(store, (10, 100_000))
    assert budget.asked_mb(store, settings("esm2_t48_15B_UR50D")) == budget.SKIPPED_MB  # 121 GB of weights
    assert 30_000 < budget.asked_mb(store, settings("esm2_t36_3B_UR50D")) < 32_000
    plan(store, (10, 20_000))
    assert budget.asked_mb(store, settings("esm2_t36_3B_UR50D")) == budget.SKIPPED_MB


def test_the_study_asks_for_minutes_by_its_seconds(store):
    plan(store, (10, 1))
    small, given = settings("esm2_t6_8M_UR50D"), 3_600
    assert budget.asked_minutes(store, small, "auto") < 10
    assert 120 <= budget.asked_minutes(store, small, given) < 130
