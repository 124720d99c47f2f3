"""The scaling study measures what its columns say, within its time and memory."""

import re
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.meters import MemoryMeter
from lengthwise.esm2.model import emulated_on_cpu
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.report.study import engines, measure
from lengthwise.report.study.facts import why_skipped
from lengthwise.report.study.rounds import MAX_REPEATS
from lengthwise.report.study.schema import SERIES, read_scaling
from lengthwise.store.receipts import RECEIPT, damaged_by_receipt, read_receipt, write_receipt
from lengthwise.system import control_groups, machine
from lengthwise.system.files import facts

SHAPE = ModelConfig(2, 32, 2)
LENGTHS = (50, 100, 200, 350, 500, 1500)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    checkpoint.write_random(path, SHAPE)
    return path


@pytest.fixture(scope="module")
def study(weights, tmp_path_factory):
    """In a process of its own, as in a run: memory that earlier tests left to the allocator would serve its passes."""
    folder = tmp_path_factory.mktemp("study")
    # Seconds on a quiet machine, where the repeats end it; on a busy one no length may lack time.
    code = f"""
import sys
from pathlib import Path
from lengthwise.report.study import measure
measure.LENGTHS["cpu"] = {LENGTHS}
weights, folder = map(Path, sys.argv[1:])
measure.scaling(weights, "cpu", "float32", folder / "scaling.tsv", seconds=90.0).to_pickle(folder / "rows.pkl")
"""
    done = subprocess.run([sys.executable, "-c", code, weights, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pd.read_pickle(folder / "rows.pkl"), folder / "scaling.tsv"


def single(rows, engine, gradients, precision="float32"):
    chosen = (rows["engine"] == engine) & (rows["gradients"] == gradients) & (rows["precision"] == precision)
    return rows[chosen & rows["batch_tokens"].isna()]


def test_every_variant_is_measured_at_ascending_lengths(study):
    rows, _ = study
    assert list(rows.columns) == list(measure.COLUMNS)
    served = {"float32"} | ({"bfloat16"} if not emulated_on_cpu(torch.bfloat16) else set())
    assert set(rows["precision"]) == served
    for engine in (measure.LENGTHWISE, measure.FAIR_ESM):
        for gradients in (False, True):
            assert tuple(single(rows, engine, gradients)["length"]) == LENGTHS
        for precision in served:
            chosen = (rows["engine"] == engine) & (rows["precision"] == precision) & rows["batch_tokens"].notna()
            assert tuple(rows.loc[chosen, "length"]) == LENGTHS[:5]
    assert (rows.loc[rows["batch_tokens"].isna(), "n_sequences"] == 1).all()
    full = rows[rows["batch_tokens"].notna()]
    assert not full["gradients"].any()
    assert (full["n_sequences"] > 1).all()
    assert (full["n_tokens"] / full["batch_tokens"]).between(0.8, 1.2).all()


def test_columns_agree_with_each_other(study):
    rows, _ = study
    done = rows[rows["status"] == measure.OK]
    assert len(done) > 20
    assert (done["n_tokens"] == done["n_sequences"] * (done["length"] + 2)).all()
    assert done["repeats"].between(1, MAX_REPEATS).all()
    assert (done["wall_ms"] <= done["wall_ms_median"]).all()
    assert (done["wall_ms_median"] <= done["wall_ms_max"]).all()
    rate = done["n_sequences"] * done["length"] / (done["wall_ms"] / 1000)
    assert done["residues_per_second"].to_numpy(float) == pytest.approx(rate.to_numpy(float))
    flops = [SHAPE.flops(length) * n for length, n in zip(done["length"], done["n_sequences"], strict=True)]
    assert (done["product_flops"] + done["attention_flops"]).tolist() == flops


def test_on_a_cpu_nothing_is_copied_and_no_zero_says_otherwise(study):
    rows, _ = study
    assert rows[["copy_in_ms", "copy_out_ms"]].isna().all(axis=None)


def test_where_tokens_lie_is_known_before_the_clock_starts(weights, tmp_path, monkeypatch):
    """In a job another thread makes it, and copies it while the device computes."""
    at_work, made = [], []
    seconds, of = measure.Probe.seconds, engines.Packing.of

    def timed(probe, forward):
        at_work.append(True)
        try:
            return seconds(probe, forward)
        finally:
            at_work.pop()

    monkeypatch.setattr(measure.Probe, "seconds", timed)
    monkeypatch.setattr(engines.Packing, "of", lambda *given: made.append(bool(at_work)) or of(*given))
    measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.5)
    assert set(made) == {False}


def test_layers_are_compiled_where_jobs_are_long_enough_but_for_gradients(study, weights, tmp_path, monkeypatch):
    assert set(study[0].loc[study[0]["engine"] == measure.LENGTHWISE, "compiled"]) == {False}
    assert study[0].loc[study[0]["engine"] == measure.FAIR_ESM, "compiled"].isna().all()
    compiled = checkpoint.load_model(weights, torch.device("cpu"), torch.float32)
    compiled.compiled_parts = {"finish": None}  # as far as this test sees
    monkeypatch.setattr(engines, "_compiled_model", lambda *_: compiled)
    for gradients in (False, True):
        stage = engines.Stage("float32", gradients, (None,), 1)
        loaded = measure.load_engines(weights, torch.device("cpu"), stage, True)
        assert loaded[measure.LENGTHWISE].compiled is not gradients
    (tmp_path / "plan").mkdir()
    assert not engines.jobs_compile(tmp_path)
    for seconds, expected in ((299, False), (301, True)):
        jobs = f"job\tdatasets\tforecast_seconds\na\tx\t20\nb\tx\t{seconds}\n"
        (tmp_path / "plan" / "jobs.tsv").write_text(jobs)
        assert engines.jobs_compile(tmp_path) is expected


def test_half_precision_halves_the_weights(study):
    rows, _ = study
    weights = rows.groupby(["engine", "precision"])["weights_bytes"].first()
    if "bfloat16" not in set(rows["precision"]):
        pytest.skip("this CPU has no instructions for half precision")
    assert weights[measure.FAIR_ESM, "bfloat16"] == pytest.approx(weights[measure.FAIR_ESM, "float32"] / 2, rel=0.01)
    # Lengthwise keeps embeddings, LayerNorms and what is rounded in half precision in float32: little, but in a tiny model.
    assert 0.5 < weights[measure.LENGTHWISE, "bfloat16"] / weights[measure.LENGTHWISE, "float32"] < 0.7


def test_the_table_reads_back_as_it_was(study):
    rows, table = study
    pd.testing.assert_frame_equal(read_scaling(table), rows)


@pytest.mark.skipif(not MemoryMeter(torch.device("cpu")).resident, reason="resident memory is not measured here")
def test_memory_grows_with_length_and_with_gradients_and_quadratically_in_fair_esm(study):
    rows, _ = study
    assert set(rows["memory_measure"]) == {"resident"}
    peak = {
        (engine, gradients): single(rows, engine, gradients).set_index("length")["peak_bytes"]
        for engine in (measure.LENGTHWISE, measure.FAIR_ESM)
        for gradients in (False, True)
    }
    for series in peak.values():
        assert series[1500] > series[500] > 0
    # 2 heads x 1,502^2 float32 scores are 18 MB: fair-esm holds them, and keeps those of both layers for gradients.
    assert peak[measure.FAIR_ESM, False][1500] > 18e6
    assert peak[measure.FAIR_ESM, True][1500] > 36e6
    assert peak[measure.LENGTHWISE, True][1500] < 18e6


def test_without_time_everything_is_skipped_and_null(weights, tmp_path):
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.0)
    assert set(rows["status"]) == {measure.SKIPPED_TIME}
    assert rows[["wall_ms", "residues_per_second", "peak_bytes"]].isna().all(axis=None)
    assert read_scaling(tmp_path / "scaling.tsv")["peak_bytes"].isna().all()


def test_a_new_study_takes_its_place_in_the_receipt_of_the_report(weights, tmp_path):
    (tmp_path / "page.html").write_text("the page")
    write_receipt(tmp_path, ["page.html"], datasets=["a"])
    for _ in range(2):
        measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.0)
        expected = {name: facts(tmp_path / name) for name in ("page.html", "scaling.tsv")}
        assert read_receipt(tmp_path) == {"datasets": ["a"], "files": expected}
        (tmp_path / "scaling.tsv").unlink()
        assert damaged_by_receipt(tmp_path) == ["scaling.tsv"]
    (tmp_path / RECEIPT).write_text("")
    measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.0)
    assert read_receipt(tmp_path) == {"files": {"scaling.tsv": facts(tmp_path / "scaling.tsv")}}


def test_with_little_time_only_long_points_are_skipped(weights, tmp_path):
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.05)
    assert {measure.OK, measure.SKIPPED_TIME} == set(rows["status"])
    for _, series in rows.groupby(SERIES, dropna=False):
        skipped = series["status"] == measure.SKIPPED_TIME
        assert skipped.is_monotonic_increasing


def test_a_point_that_would_not_fit_in_memory_is_not_tried(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(measure.LENGTHS, "cpu", LENGTHS[:4])
    monkeypatch.setattr(measure.Probe, "free_bytes", lambda _: 20_000_000)
    monkeypatch.setattr(measure.Probe, "peak_bytes", lambda _, forward: (forward(), 10_000_000)[1])
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=20.0)
    ours = single(rows, measure.LENGTHWISE, False)
    assert list(ours["status"]) == [measure.OK] + [measure.SKIPPED_MEMORY] * 3


def test_a_series_that_runs_out_of_memory_ends_and_the_next_goes_on(weights, tmp_path, monkeypatch):
    load = engines._load_lengthwise

    def load_small_device(*arguments):
        loaded = load(*arguments)

        def prepare(tokens):
            def limited():
                if tokens.shape[1] > 300:
                    raise torch.OutOfMemoryError("as CUDA raises it")
                return loaded.prepare(tokens)()

            return limited

        return replace(loaded, prepare=prepare)

    monkeypatch.setattr(engines, "_load_lengthwise", load_small_device)
    monkeypatch.setitem(measure.LENGTHS, "cpu", LENGTHS[:5])
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=20.0)
    for gradients in (False, True):
        ours = single(rows, measure.LENGTHWISE, gradients)
        assert list(ours["length"]) == [50, 100, 200, 350]
        assert list(ours["status"]) == [measure.OK] * 3 + [measure.OUT_OF_MEMORY]
        assert ours["wall_ms"].isna().tolist() == [False] * 3 + [True]
    assert measure.OUT_OF_MEMORY not in set(single(rows, measure.FAIR_ESM, False)["status"])


def test_an_engine_whose_weights_do_not_fit_is_said_to_and_the_others_go_on(weights, tmp_path, monkeypatch):
    def refused(*_):
        raise torch.OutOfMemoryError("as CUDA raises it")

    monkeypatch.setattr(engines, "_load_fair_esm", refused)
    monkeypatch.setitem(measure.LENGTHS, "cpu", LENGTHS[:2])
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=20.0)
    refused_rows = rows[rows["engine"] == measure.FAIR_ESM]
    assert set(refused_rows["status"]) == {measure.OUT_OF_MEMORY}
    assert refused_rows["weights_bytes"].isna().all()
    assert set(rows.loc[rows["engine"] == measure.LENGTHWISE, "status"]) == {measure.OK}


def test_the_clock_and_the_temperature_are_noted_where_they_can_be_read(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "clock_and_temperature", lambda _: (2400.0, None))
    monkeypatch.setitem(measure.LENGTHS, "cpu", (50, 8000))
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=0.5)
    measured = rows["wall_ms"].notna()
    assert set(rows.loc[measured, "clock_mhz"]) == {2400.0}
    assert rows["temperature_c"].isna().all()
    assert rows.loc[~measured, "clock_mhz"].isna().all()


def test_copies_of_a_device_are_timed_apart(monkeypatch):
    """What a GPU would do, with the clock and the copies of a stand-in."""
    probe = measure.Probe(torch.device("cpu"))
    assert probe.copies(torch.ones(1, 52, dtype=torch.int64), lambda: torch.ones(52, 32)) == {}
    probe.device = torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **named: empty(*shape, **named))
    copied = []
    monkeypatch.setattr(probe, "seconds", lambda copy: copied.append(copy()) or 0.002)
    found = probe.copies(torch.ones(1, 52, dtype=torch.int64), lambda: torch.ones(52, 32))
    assert found == {"copy_in_ms": 2.0, "copy_out_ms": 2.0}
    assert {(tuple(each.shape), each.dtype) for each in copied} == {((1, 52), torch.uint8), ((52, 32), torch.float16)}


def test_a_table_of_an_earlier_version_is_read_with_what_it_has(study, tmp_path):
    rows, _ = study
    then = ["engine", "gradients", "length", "n_sequences", "n_tokens", "repeats", "wall_ms", "residues_per_second"]
    then += ["peak_bytes", "memory_measure", "device", "precision", "status"]
    rows[then].to_csv(tmp_path / "old.tsv", sep="\t", index=False)
    read = read_scaling(tmp_path / "old.tsv")
    pd.testing.assert_frame_equal(read[then], rows[then])
    assert (read["batch_tokens"].isna() == rows["batch_tokens"].isna()).all()
    assert read["product_flops"].isna().all()


def test_an_earlier_versions_median_gives_way_to_its_shortest_pass(study, tmp_path):
    rows, _ = study
    old = rows.rename(columns={"wall_ms": "wall_ms_min", "wall_ms_median": "wall_ms"})
    old["residues_per_second"] = old["n_sequences"] * old["length"] / (old["wall_ms"] / 1000)
    old.to_csv(tmp_path / "old.tsv", sep="\t", index=False)
    pd.testing.assert_frame_equal(read_scaling(tmp_path / "old.tsv"), rows)


def test_without_memory_for_both_engines_the_study_is_skipped_and_a_later_one_measures(weights, tmp_path, monkeypatch):
    """The limit is of a control group above the process's own."""
    monkeypatch.setattr(control_groups, "memory_limits", lambda: iter([(10**12, 0), (100_000, 40_000)]))
    monkeypatch.setattr(machine, "memory_limits", lambda: control_groups.memory_limits())
    loaded = []
    monkeypatch.setattr(measure, "load_engines", lambda *_: loaded.append(True) or {})
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=20.0)
    assert not loaded
    assert set(rows["status"]) == {measure.SKIPPED_MEMORY}
    assert set(rows["free_bytes"]) == {60_000}
    assert (rows["needed_bytes"] > 8 * SHAPE.parameters).any()
    said = why_skipped(read_scaling(tmp_path / "scaling.tsv"))
    assert re.search(r"side by side take [\d.]+ kB, and 60 kB were free\. .*snakemake --forcerun scaling", said)
    monkeypatch.undo()
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=1.0)
    assert why_skipped(read_scaling(tmp_path / "scaling.tsv")) == ""


def test_gradients_that_memory_does_not_hold_leave_the_other_precisions(weights, tmp_path, monkeypatch):
    needed = measure._needed_bytes
    monkeypatch.setattr(
        measure, "_needed_bytes", lambda config, stage: 1e18 if stage.gradients else needed(config, stage)
    )
    monkeypatch.setattr(measure, "emulated_on_cpu", lambda dtype: dtype == torch.float16)
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=5.0)
    assert set(rows.loc[rows["gradients"], "status"]) == {measure.SKIPPED_MEMORY}
    assert measure.OK in set(rows.loc[rows["precision"] == "bfloat16", "status"])


@pytest.mark.parametrize(("idle", "threads"), [(0.2, 1), (1.7, 2), (64.0, 3)])
def test_a_pass_has_no_more_threads_than_cores_are_idle(weights, tmp_path, monkeypatch, idle, threads):
    monkeypatch.setattr(measure, "idle_cores", lambda: idle)
    monkeypatch.setattr(measure, "set_threads", torch.set_num_threads)  # however few cores this machine has
    before = torch.get_num_threads()
    try:
        rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", threads=3, seconds=0.5)
    finally:
        torch.set_num_threads(before)
    assert set(rows["threads"]) == {threads}


def test_what_a_scheduler_gave_is_a_limit_too(weights, tmp_path):
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=20.0, memory_bytes=1e6)
    assert set(rows["status"]) == {measure.SKIPPED_MEMORY}


def test_loading_is_a_part_of_the_time_where_it_counts(weights, tmp_path, monkeypatch):
    load = measure.load_engines

    def slowly(*arguments):
        time.sleep(0.5)
        return load(*arguments)

    monkeypatch.setattr(measure, "load_engines", slowly)
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "a.tsv", seconds=0.3, loading_counts=True)
    assert set(rows["status"]) == {measure.SKIPPED_TIME}
    assert "loading the models took its time" in why_skipped(rows)
    rows = measure.scaling(weights, "cpu", "float32", tmp_path / "b.tsv", seconds=0.3)
    assert measure.OK in set(rows["status"])


def test_an_error_that_is_not_about_memory_is_raised(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Probe, "peak_bytes", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure.scaling(weights, "cpu", "float32", tmp_path / "scaling.tsv", seconds=20.0)
    assert not (tmp_path / "scaling.tsv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(weights, tmp_path):
    with pytest.raises(LengthwiseError, match="cuda"):
        measure.scaling(weights, "cuda", "float16", tmp_path / "scaling.tsv")
