"""Parity: an engine or a writer that is wrong ends the job; one that is right leaves a receipt, once for a device."""

import numpy as np
import pytest
import torch

from lengthwise.esm2 import checkpoint, engine
from lengthwise.esm2.checkpoint import reference_model
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.status import Status
from lengthwise.ingest.digests import digest_name
from lengthwise.jobs import comparison, embed_job, parity, parity_sample
from lengthwise.maintain.prune import prune
from lengthwise.store import paths
from lengthwise.store.paths import QUARANTINE_ENDING, job_record_path, shard_path
from lengthwise.store.shard import Shard
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.system.files import read_json, write_json


@pytest.fixture
def new(small_store, random_proteins):
    """Makes a store of one planned job of several shards."""

    def make(proteins=None, job_seconds: float = 1200.0, shard_bytes: int = 8_000, **config):
        store = small_store(**config)
        store.ingest("a", proteins or random_proteins(30))
        return store, store.plan(shard_bytes=shard_bytes, job_seconds=job_seconds)["job"].tolist()

    return make


@pytest.fixture
def comparisons(monkeypatch):
    """Counts comparisons with fair-esm."""
    asked, compare = [], comparison.compare
    monkeypatch.setattr(comparison, "compare", lambda *given: asked.append(given) or compare(*given))
    return asked


@pytest.fixture
def wrong_frequencies(monkeypatch):
    """Rotary frequencies off by a tenth of a percent: what recomputing a checkpoint's rounded ones comes to. Undone on exit."""

    def wrong(*arguments):
        model = load(*arguments)
        model.inv_freq.mul_(1.001)
        return model

    load = engine.load_model
    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_model", wrong)
        yield patch


def quarantined(store) -> list[str]:
    return sorted(
        path.name.partition(".safetensors")[0] for path in (store.path / "shards").rglob(f"*{QUARANTINE_ENDING}")
    )


def receipts(store) -> list[dict]:
    return [read_json(path)["parity"] for path in sorted((store.path / "parity").iterdir())]


@pytest.mark.parametrize(
    ("config", "moves"),
    [
        ({"storage_dtype": "float32"}, (1e-8, 1e-6)),
        ({"storage_dtype": "float16"}, (1e-8, 1e-6)),
        ({"precision": "bfloat16"}, (1e-3, 1e-2)),
        ({"precision": "float16"}, (1e-4, 1e-3)),
        ({"layers": [0, 1, 2], "outputs": ["residue", "mean", "bos"]}, (1e-8, 1e-6)),
        ({"outputs": ["mean"]}, (1e-8, 1e-6)),
    ],
    ids=str,
)
def test_a_receipt_says_how_near_the_limits_a_job_is(new, config, moves):
    store, (job,) = new(shard_bytes=24_000, **config)
    receipt = store.embed(job)["parity"]
    assert receipt["truth"] == "float64"
    assert receipt["not_compared"] == {}
    assert 0 < receipt["engine"]["share_of_limit"] < 0.6
    assert 0 < receipt["stored"]["share_of_limit"] < 0.6
    assert receipt["engine"]["error"] < receipt["engine"]["limit"] < 1e-5
    assert moves[0] < receipt["moves"] < moves[1]
    assert receipt["moves"] < 2 * receipt["fair_esm_moves"]
    if "residue" in store.settings["outputs"] and store.settings["storage_dtype"] == "float16":
        assert 1e-4 < receipt["storage_moves"] < 1e-3
    else:
        assert receipt["storage_moves"] == 0
    shortest = store.work_order(job)["length"].min()
    assert receipt["compared"][0]["residues"] == shortest


def test_the_moves_of_a_receipt_are_those_of_an_own_computation(new):
    store, (job,) = new(layers=[1], outputs=["residue"], storage_dtype="float32")
    receipt = store.embed(job)["parity"]
    stored = {digest_name(digest): rows for (digest, name), rows in store.rows().items() if name == "layer_1"}
    sequences = {digest_name(row.digest): row.sequence.decode() for row in store.work_order(job).itertuples()}
    model, right, ours = reference_model(store.config["model"]).double(), [], []
    for each in receipt["compared"]:
        _, _, tokens = model.alphabet.get_batch_converter()([("", sequences[each["digest"]])])
        with torch.no_grad():
            right.append(model(tokens, repr_layers=[1])["representations"][1][0, 1:-1].numpy())
        ours.append(np.frombuffer(stored[each["digest"]], np.float32).reshape(right[-1].shape))
    right, ours = np.concatenate(right), np.concatenate(ours)
    shares = np.sqrt(((ours - right) ** 2).mean(0)) / right.std(0)
    assert receipt["moves"] == pytest.approx(np.median(shares), rel=0.2)  # other batches, so sums in another order


def test_a_device_is_compared_once_and_again_with_other_versions(new, comparisons, monkeypatch):
    store, jobs = new(job_seconds=1e-9)
    records = [store.embed(job) for job in jobs]
    compared = [record["parity"] for record in records if "compared" in record["parity"]]
    assert len(comparisons) == 1
    assert all(each == compared[0] for each in compared)
    monkeypatch.setattr(embed_job, "versions", lambda: {"torch": "9.9"})
    job_record_path(store.path, jobs[-1]).unlink()
    store.embed(jobs[-1])
    assert len(comparisons) == 2
    files = [read_json(path) for path in (store.path / "parity").iterdir()]
    assert sorted(file["versions"]["torch"] for file in files) == sorted([torch.__version__, "9.9"])


@pytest.mark.parametrize("text", ["", "{}", '{"device": "", "versions": {}, "parity": {"min_cosine": 1, "bound": ""}}'])
def test_a_receipt_that_is_damaged_or_of_an_earlier_version_is_made_again(new, comparisons, text):
    store, (job,) = new()
    first = store.embed(job)
    (path,) = (store.path / "parity").iterdir()
    path.write_text(text)
    job_record_path(store.path, job).unlink()
    store.embed(job)
    assert len(comparisons) == 2
    assert read_json(path)["device"] == first["device"]


def test_a_miss_stops_the_job_after_its_first_shard_and_the_stores_other_jobs_at_once(new, refused, wrong_frequencies):
    store, (job, other, *_) = new(job_seconds=4e-4)
    total = store.work_order(job)["shard"].nunique()
    assert total > 1
    with refused("layer_2", "float32 pass", "times the limit", "in quarantine: ", QUARANTINE_ENDING, "parity: warn"):
        store.embed(job)
    assert not job_record_path(store.path, job).exists()
    assert store.shard_files() == []
    assert len(quarantined(store)) == 1
    wrong_frequencies.setattr(embed_job, "open_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    for again in (job, other):
        with refused("recorded in", "parity: warn", "remove that file"):
            store.embed(again)
    assert [path for path in prune(store.path) if path.name.endswith(QUARANTINE_ENDING)]


@pytest.mark.parametrize("policy", ["warn", "off"])
def test_who_accepts_a_miss_gets_the_shards_back_and_the_job_done(new, refused, wrong_frequencies, caplog, policy):
    store, (job,) = new()
    with refused("times the limit"):
        store.embed(job)
    (shard,) = quarantined(store)
    record = store.embed(job, parity=policy)
    assert quarantined(store) == []
    assert shard in record["shards"]
    assert shard not in record["made"]
    assert ("miss" in record["parity"]) == (policy == "warn")
    assert ("times the limit" in caplog.text) == (policy == "warn")


def test_a_miss_that_is_warned_of_ends_nothing(new, wrong_frequencies, caplog):
    store, (job,) = new()
    record = store.embed(job, parity="warn")
    assert "is not what fair-esm computes" in record["parity"]["miss"]
    assert "is not what fair-esm computes" in caplog.text
    assert quarantined(store) == []
    assert store.assemble("a")["made_by"][0]["parity"] == record["parity"]
    assert "MISSED" in (store.path / "datasets" / "a" / "README.md").read_text()


def test_parity_off_compares_nothing(new, comparisons):
    store, (job,) = new()
    assert store.embed(job, parity="off")["parity"] == {"skipped": "parity: off"}
    assert comparisons == []
    assert not (store.path / "parity").exists()


def test_a_miss_that_another_job_records_meanwhile_stops_this_one_before_its_next_shard(new, refused, monkeypatch):
    store, (job, other, *_) = new(job_seconds=4e-4)
    store.embed(other)
    planned = sorted(store.work_order(job)["shard"].unique())
    assert len(planned) > 1
    (path,) = (store.path / "parity").iterdir()
    opened, init = [], ShardWriter.__init__

    def opened_before_a_miss(self, store, shard, *rest, **options):
        init(self, store, shard, *rest, **options)
        opened.append(shard)
        write_json(path, read_json(path) | {"parity": read_json(path)["parity"] | {"miss": "layer_2 is wrong"}})

    monkeypatch.setattr(ShardWriter, "__init__", opened_before_a_miss)
    with refused("layer_2 is wrong", "recorded in"):
        store.embed(job)
    assert len(opened) == 1
    assert not job_record_path(store.path, job).exists()
    assert set(store.shard_files()) == {shard_path(store.path, s) for s in store.work_order(other)["shard"].unique()}


def test_shards_of_a_wrong_engine_whose_process_was_killed_before_it_compared_are_not_left(
    new, refused, wrong_frequencies, monkeypatch
):
    store, (job, other, *_) = new(job_seconds=4e-4)
    with monkeypatch.context() as patch:
        patch.setattr(parity.Parity, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.embed(job)
    (left,) = store.shard_files()
    with refused("times the limit"):
        store.embed(other)
    with refused("times the limit", "in quarantine: ", left.name):
        store.embed(job)
    assert store.shard_files() == []
    assert left.name.removesuffix(".safetensors") in quarantined(store)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["layer_0", "layer_2", "mean_0", "mean_2", "bos_0", "bos_2"])
def test_whichever_tensor_is_wrong_is_found(new, refused, monkeypatch, name, precision):
    store, (job,) = new(layers=[0, -1], outputs=["residue", "mean", "bos"], precision=precision)
    pool = Output.pool

    def wrong(self, hidden, packing):
        results = pool(self, hidden, packing)
        results[name] += 0.01
        return results

    monkeypatch.setattr(Output, "pool", wrong)
    with refused(name, "float32 pass"):
        store.embed(job)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_is_wrong_in_half_precision_alone_is_found_in_the_stored_rows(new, refused, monkeypatch, precision):
    store, (job,) = new(precision=precision)
    forward = Engine._forward

    def wrong(self, batch):
        one = forward(self, batch)
        if self.precision == precision:
            one.arrays = {name: values.roll(1, 0) for name, values in one.arrays.items()}
        return one

    monkeypatch.setattr(Engine, "_forward", wrong)
    with refused("layer_2", "as it is stored"):
        store.embed(job)
    assert receipts(store)[0]["engine"]["share_of_limit"] < 1


def test_what_is_compared_is_what_is_stored(new, refused, monkeypatch):
    """Rows of another residue, right in memory and wrong in the file."""
    store, (job,) = new()
    write = ShardWriter.write

    def wrong(self, first, arrays, status):
        write(self, first, {n: np.roll(a, 1, 0) if n == "layer_2" else a for n, a in arrays.items()}, status)

    monkeypatch.setattr(ShardWriter, "write", wrong)
    with refused("layer_2", "as it is stored"):
        store.embed(job)


def test_wrong_rows_of_another_process_are_made_again_and_not_held_against_this_device(new, refused, monkeypatch):
    right, (job,) = new()
    right.embed(job, parity="off")
    store, (job,) = new()
    write = ShardWriter.write

    def wrong(self, first, arrays, status):
        write(self, first, {name: rows + 1 for name, rows in arrays.items()}, status)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", wrong)
        store.embed(job, parity="off")
    job_record_path(store.path, job).unlink()
    with refused("as it is stored", "in quarantine", "run again"):
        store.embed(job)
    assert not (store.path / "parity").exists()
    assert store.shard_files() == []
    store.embed(job)
    assert store.rows() == right.rows()


@pytest.mark.parametrize("end", ["killed before it compares", "warned of a miss"])
def test_wrong_rows_of_other_versions_in_an_unfinished_job_are_made_again(new, wrong_frequencies, monkeypatch, end):
    store, (job,) = new()
    versions = embed_job.versions()
    with monkeypatch.context() as patch:
        patch.setattr(embed_job, "versions", lambda: versions | {"torch": "9.9"})
        if end.startswith("killed"):
            patch.setattr(parity.Parity, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.embed(job)
        else:
            store.embed(job, parity="warn")
            job_record_path(store.path, job).unlink()
    wrong_frequencies.undo()
    assert store.shard_files()
    assert len(store.embed(job)["made"]) == len(store.shard_files())
    assert quarantined(store)
    right, (job,) = new()
    right.embed(job, parity="off")
    assert store.rows() == right.rows()


def test_where_nothing_can_be_compared_rows_of_other_versions_in_an_unfinished_job_stay(new, monkeypatch):
    store, (job,) = new()
    versions = embed_job.versions()
    monkeypatch.setattr(parity, "choose_sample", lambda *_: "fair-esm would take too long")
    with monkeypatch.context() as patch:
        patch.setattr(embed_job, "versions", lambda: versions | {"torch": "9.9"})
        patch.setattr(embed_job, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.embed(job)
    before = store.shard_files()
    assert store.embed(job)["made"] == []
    assert store.shard_files() == before
    assert quarantined(store) == []


def test_right_rows_of_other_versions_in_an_unfinished_job_stay_whatever_these_versions_do(
    new, refused, wrong_frequencies, monkeypatch
):
    store, (job,) = new()
    with monkeypatch.context() as patch:
        wrong = engine.load_model
        patch.setattr(engine, "load_model", checkpoint.load_model)
        versions = embed_job.versions()
        patch.setattr(embed_job, "versions", lambda: versions | {"torch": "9.9"})
        store.embed(job)
    assert engine.load_model is wrong
    before = store.shard_files()
    job_record_path(store.path, job).unlink()
    with refused("times the limit"):
        store.embed(job)
    assert store.shard_files() == before
    assert quarantined(store) == []


def test_shards_of_a_process_that_ended_before_it_compared_are_compared(new, monkeypatch):
    store, (job,) = new()
    with monkeypatch.context() as patch:
        patch.setattr(embed_job, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.embed(job, parity="off")
    record = store.embed(job)
    assert record["made"] == []
    assert record["parity"]["compared"]


def test_long_sequences_are_not_compared(new, random_proteins):
    proteins = random_proteins(3, 1_200, 1_300) | random_proteins(3, 20, 30, prefix="short")
    store, (job,) = new(proteins, outputs=["mean"])
    assert max(each["residues"] for each in store.embed(job)["parity"]["compared"]) <= 30
    store, (job,) = new(random_proteins(3, 1_200, 1_300), outputs=["mean"])
    assert "no sequence of at most 1,022 residues" in store.embed(job)["parity"]["skipped"]
    assert not (store.path / "parity").exists()


def test_where_float64_would_take_too_long_fair_esm_in_float32_is_the_truth(new, monkeypatch):
    monkeypatch.setitem(parity_sample._FLOPS["cpu"], "float64", 1.0)
    for config in ({}, {"precision": "bfloat16"}):
        store, (job,) = new(**config)
        receipt = store.embed(job)["parity"]
        assert receipt["truth"] == "float32"
        assert receipt["engine"]["limit"] >= 0.01
        assert receipt["stored"]["share_of_limit"] < 0.5


def test_with_the_truth_in_float32_a_wrong_engine_is_found(new, refused, monkeypatch):
    monkeypatch.setitem(parity_sample._FLOPS["cpu"], "float64", 1.0)
    store, (job,) = new()
    monkeypatch.setattr(
        Output,
        "pool",
        lambda self, hidden, packing, pool=Output.pool: pool(
            self, {layer: rows.roll(1, 0) for layer, rows in hidden.items()}, packing
        ),
    )
    with refused("layer_2"):
        store.embed(job)


def test_what_would_take_more_than_its_share_is_not_compared(new, comparisons, monkeypatch):
    monkeypatch.setattr(parity, "PARITY_SECONDS", 1e-9)
    monkeypatch.setattr(parity, "PARITY_SHARE", 1e-9)
    store, (job,) = new()
    assert "fair-esm would take" in store.embed(job)["parity"]["skipped"]
    assert comparisons == []


def test_a_reference_that_does_not_fit_is_not_compared(new, comparisons, monkeypatch):
    store, (job,) = new()
    monkeypatch.setattr(parity, "host_available", lambda: 1_000)
    assert "GB in float32, and 0.0 GB were free" in store.embed(job)["parity"]["skipped"]
    assert comparisons == []
    assert job_record_path(store.path, job).exists()


def test_memory_that_runs_out_ends_the_comparison_alone(new, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(comparison, "reference_rows", out_of_memory)
    store, (job,) = new()
    assert store.embed(job)["parity"] == {"skipped": "memory ran out"}


def test_a_type_that_fair_esm_does_not_run_in_is_named(new, monkeypatch, caplog):
    rows = comparison.reference_rows

    def lacks_half(checkpoint, device, dtype, *rest):
        if dtype == torch.float16:
            raise RuntimeError("\"softmax\" not implemented for 'Half'\nmore")
        return rows(checkpoint, device, dtype, *rest)

    monkeypatch.setattr(comparison, "reference_rows", lacks_half)
    caplog.set_level("INFO")
    store, (job,) = new(precision="float16")
    receipt = store.embed(job)["parity"]
    assert receipt["not_compared"] == {"fair-esm in float16": "\"softmax\" not implemented for 'Half'"}
    assert receipt["fair_esm_moves"] is None
    assert receipt["engine"]["share_of_limit"] < 0.6
    assert receipt["stored"]["share_of_limit"] < 0.1
    assert "not compared: fair-esm in float16, because" in caplog.text


def test_a_twin_in_float32_that_does_not_fit_leaves_the_stored_rows_compared(new, monkeypatch):
    store, (job,) = new(precision="bfloat16")
    monkeypatch.setattr(Engine, "in_float32", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    receipt = store.embed(job)["parity"]
    assert receipt["engine"] is None
    assert "does not fit" in receipt["not_compared"]["this engine in float32"]
    assert receipt["stored"]["share_of_limit"] < 0.6


def test_rows_that_no_type_so_coarse_can_tell_from_wrong_ones_are_not_compared(new, monkeypatch, caplog):
    monkeypatch.setattr(comparison, "SATURATED", 1e-4)
    caplog.set_level("INFO")
    store, (job,) = new(precision="bfloat16")
    receipt = store.embed(job)["parity"]
    assert receipt["stored"] is None
    assert receipt["engine"]["share_of_limit"] < 0.6
    assert "fair-esm in bfloat16 moves a channel by" in receipt["not_compared"]["stored rows"]
    assert "not compared: stored rows, because" in caplog.text


def test_a_type_that_is_too_coarse_for_the_model_is_warned_of(new, monkeypatch, caplog):
    monkeypatch.setattr(parity, "COARSE", 1e-4)
    store, (job,) = new(precision="bfloat16")
    store.embed(job)
    assert "bfloat16 is too coarse for this model" in caplog.text
    assert "take precision: float16 or float32" in caplog.text


def test_sequences_that_overflowed_are_not_compared(new, monkeypatch):
    store, (job,) = new()
    status = engine.finite_status
    monkeypatch.setattr(engine, "finite_status", lambda *a: torch.full_like(status(*a), Status.NON_FINITE))
    assert "finite rows" in store.embed(job)["parity"]["skipped"]
    assert all((Shard(path)["status"] == Status.NON_FINITE).all() for path in store.shard_files())


def test_the_float32_twin_is_loaded_once_a_job_and_not_kept_for_the_receipt_alone(new, monkeypatch):
    loaded, init = [], Engine.__init__

    def counted(self, checkpoint, device, precision, *rest, **options):
        loaded.append(precision)
        init(self, checkpoint, device, precision, *rest, **options)

    monkeypatch.setattr(Engine, "__init__", counted)
    store, (job,) = new(precision="bfloat16")
    store.embed(job)
    assert loaded == ["bfloat16", "float32"]
    loaded.clear()
    status = engine.finite_status

    def half_overflows(results, packing, *contacts):
        found = status(results, packing, *contacts)
        return (
            found if len(found) == 1 else torch.full_like(found, Status.NON_FINITE)
        )  # repairs are of one sequence each

    monkeypatch.setattr(engine, "finite_status", half_overflows)
    store, (job,) = new(precision="bfloat16")
    assert store.work_order(job)["shard"].nunique() > 2
    store.embed(job, parity="off")
    assert loaded == ["bfloat16", "float32"]


def test_one_homopolymer_whose_rows_are_all_alike_is_compared(new):
    store, (job,) = new({"a": "A" * 30}, layers=[0], outputs=["residue", "mean", "bos"])
    receipt = store.embed(job)["parity"]
    assert receipt["engine"]["share_of_limit"] <= 1
    assert receipt["stored"]["share_of_limit"] <= 1


def test_a_shard_comes_back_once(new, refused, wrong_frequencies):
    store, (job,) = new()
    with refused("times the limit"):
        store.embed(job)
    (shard,) = quarantined(store)
    store.embed(job, parity="warn")
    path = shard_path(store.path, shard)
    path.rename(paths.quarantined(path))  # as verify does
    job_record_path(store.path, job).unlink()
    assert shard in store.embed(job, parity="warn")["made"]
