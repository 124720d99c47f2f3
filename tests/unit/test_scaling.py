import pandas as pd
import pytest
import torch

from lengthwise import checkpoint, scaling
from lengthwise.errors import LengthwiseError
from lengthwise.memory import MemoryMeter
from lengthwise.scaling_table import read_scaling
from lengthwise.shapes import ModelConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    checkpoint.write_random(path, ModelConfig(2, 32, 2))
    return path


@pytest.fixture(scope="module")
def study(weights, tmp_path_factory):
    table = tmp_path_factory.mktemp("study") / "scaling.tsv"
    return scaling.scaling(weights, "cpu", "float32", table, seconds=20.0), table


def single(rows, engine, gradients):
    chosen = (rows["engine"] == engine) & (rows["gradients"] == gradients) & (rows["n_sequences"] == 1)
    return rows[chosen]


def test_every_variant_is_measured_at_ascending_lengths(study):
    rows, _ = study
    assert list(rows.columns) == list(scaling.COLUMNS)
    for engine in (scaling.LENGTHWISE, scaling.FAIR_ESM):
        for gradients in (False, True):
            assert tuple(single(rows, engine, gradients)["length"]) == scaling.LENGTHS
    full = rows[rows["n_sequences"] > 1]
    assert not full["gradients"].any()
    assert full["n_tokens"].between(scaling.BATCH_TOKENS["cpu"] * 0.8, scaling.BATCH_TOKENS["cpu"] * 1.2).all()


def test_columns_agree_with_each_other(study):
    rows, _ = study
    done = rows[rows["status"] == scaling.OK]
    assert len(done) > 20
    assert (done["n_tokens"] == done["n_sequences"] * (done["length"] + 2)).all()
    assert done["repeats"].between(1, scaling.MAX_REPEATS).all()
    rate = done["n_sequences"] * done["length"] / (done["wall_ms"] / 1000)
    assert done["residues_per_second"].to_numpy(float) == pytest.approx(rate.to_numpy(float))


def test_the_table_reads_back_as_it_was(study):
    rows, table = study
    pd.testing.assert_frame_equal(read_scaling(table), rows)


@pytest.mark.skipif(not MemoryMeter(torch.device("cpu")).resident, reason="resident memory is not measured here")
def test_memory_grows_with_length_and_with_gradients_and_quadratically_in_fair_esm(study):
    rows, _ = study
    assert set(rows["memory_measure"]) == {"resident"}
    peak = {
        (engine, gradients): single(rows, engine, gradients).set_index("length")["peak_bytes"]
        for engine in (scaling.LENGTHWISE, scaling.FAIR_ESM)
        for gradients in (False, True)
    }
    for series in peak.values():
        assert series[1500] > series[500] > 0
    # 2 heads x 1,502^2 float32 scores are 18 MB: fair-esm holds them, and keeps those of both layers for gradients.
    assert peak[scaling.FAIR_ESM, False][1500] > 18e6
    assert peak[scaling.FAIR_ESM, True][1500] > 36e6
    assert peak[scaling.LENGTHWISE, True][1500] < 18e6


def test_without_time_everything_is_skipped_and_null(weights, tmp_path):
    rows = scaling.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.0)
    assert set(rows["status"]) == {scaling.SKIPPED_TIME}
    assert rows[["wall_ms", "residues_per_second", "peak_bytes"]].isna().all(axis=None)
    assert read_scaling(tmp_path / "scaling.tsv")["peak_bytes"].isna().all()


def test_with_little_time_only_long_points_are_skipped(weights, tmp_path):
    rows = scaling.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.05)
    assert {scaling.OK, scaling.SKIPPED_TIME} == set(rows["status"])
    for _, series in rows.assign(single=rows["n_sequences"] == 1).groupby(["engine", "gradients", "single"]):
        skipped = series["status"] == scaling.SKIPPED_TIME
        assert skipped.is_monotonic_increasing


def test_a_point_that_would_not_fit_in_memory_is_not_tried(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling.Probe, "available_bytes", lambda _: 2_000_000)
    monkeypatch.setattr(scaling.Probe, "peak_bytes", lambda _, forward: forward() and 1_000_000)
    rows = scaling.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=20.0)
    ours = single(rows, scaling.LENGTHWISE, False)
    assert list(ours["status"]) == [scaling.OK] + [scaling.SKIPPED_MEMORY] * (len(scaling.LENGTHS) - 1)


def test_a_series_that_runs_out_of_memory_ends_and_the_next_goes_on(weights, tmp_path, monkeypatch):
    load = scaling._load_lengthwise

    def load_small_device(*arguments):
        engine, model, forward = load(*arguments)

        def limited(tokens):
            if tokens.shape[1] > 300:
                raise torch.OutOfMemoryError("as CUDA raises it")
            return forward(tokens)

        return engine, model, limited

    monkeypatch.setattr(scaling, "_load_lengthwise", load_small_device)
    rows = scaling.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=10.0)
    for gradients in (False, True):
        ours = single(rows, scaling.LENGTHWISE, gradients)
        assert list(ours["length"]) == [50, 100, 200, 350]
        assert list(ours["status"]) == [scaling.OK] * 3 + [scaling.OUT_OF_MEMORY]
        assert ours["wall_ms"].isna().tolist() == [False] * 3 + [True]
    assert (single(rows, scaling.FAIR_ESM, False)["status"] == scaling.OK).all()


def test_an_error_that_is_not_about_memory_is_raised(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling.Probe, "peak_bytes", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        scaling.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=10.0)
    assert not (tmp_path / "scaling.tsv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(weights, tmp_path):
    with pytest.raises(LengthwiseError, match="cuda"):
        scaling.scaling(weights, "cuda", "float16", tmp_path / "scaling.tsv")
