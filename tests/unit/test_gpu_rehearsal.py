"""tests/gpu runs on no machine of the CI: here those of its tests that a CPU can do run on one, with a small model."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import ModelConfig

_spec = importlib.util.spec_from_file_location("gpu_tests", Path(__file__).parent.parent / "gpu" / "test_gpu.py")
gpu_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_tests)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One small checkpoint for all models' names."""
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    checkpoint.write_random(path, ModelConfig(2, 64, 4))
    return lambda _: path


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(gpu_tests, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_tests, "RESIDUES", 6_000)
    engine = gpu_tests.engine
    # Half precision of which every CPU has the operations, if not the instructions.
    monkeypatch.setattr(
        gpu_tests, "engine", lambda path, precision="bfloat16", **given: engine(path, precision, **given)
    )


def test_every_model_equals_fair_esm_in_each_precision(weights):
    gpu_tests.test_every_model_equals_fair_esm_in_each_precision(weights, gpu_tests.SMALLEST)


def test_long_sequences_run_and_match_fair_esm_where_it_can_run(weights):
    gpu_tests.test_long_sequences_run_and_match_fair_esm_where_it_can_run(weights, 1_500)


def test_batches_in_flight_give_what_each_gives_alone(weights):
    gpu_tests.test_batches_in_flight_give_what_each_gives_alone(weights)


def test_the_same_protein_in_other_batches_differs_by_rounding(weights):
    gpu_tests.test_the_same_protein_in_other_batches_differs_by_rounding(weights, "float32")


def test_streamed_weights_give_the_rows_of_resident_ones(weights):
    gpu_tests.test_streamed_weights_give_the_rows_of_resident_ones(weights)


def test_shards_are_written_while_the_gpu_computes_and_the_metrics_say_so(weights, tmp_path):
    gpu_tests.test_shards_are_written_while_the_gpu_computes_and_the_metrics_say_so(weights, tmp_path)


def test_a_job_is_compared_with_fair_esm_on_its_device(weights, tmp_path):
    gpu_tests.test_a_job_is_compared_with_fair_esm_on_its_device(weights, tmp_path)
