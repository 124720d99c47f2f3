"""The forecast: what it says of disk, work and time is what a run then does."""

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from lengthwise import config
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import MODELS, ModelConfig
from lengthwise.export.run import export
from lengthwise.maintain.run_summary import forecast_lines_of
from lengthwise.plan import forecast, throughput
from lengthwise.plan.cuts import Sizes
from lengthwise.plan.disk_check import require_space, unfinished_jobs
from lengthwise.store.metrics import METRICS, write_metrics
from lengthwise.store.paths import job_record_path, metrics_path
from lengthwise.store.settings import expected
from lengthwise.store.sizes import missing_bytes
from lengthwise.system.files import write_json

ROOT = Path(__file__).resolve().parents[3]
TINY = ModelConfig(2, 32, 2)
# Of the tiny model, some ten jobs and more shards of 60 short proteins.
SIZES = {"job_seconds": 4e-4, "shard_bytes": 8_000}
Usage = namedtuple("Usage", "total used free")


def forecast_of(store, sizes: dict = SIZES, **options) -> dict:
    folders = {name: store.inputs(name) for name in store.datasets}
    return forecast.forecast(store.path, store.settings, folders, Sizes(**sizes), **options)


def bytes_in(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(small_store, random_proteins):
    made = small_store()
    made.ingest("a", random_proteins(60))
    return made


@pytest.fixture
def full_disk(monkeypatch):
    """As if so many bytes were free."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


def test_a_run_writes_the_bytes_that_were_forecast(small_store, random_proteins, tmp_path):
    checkpoint.write_random(tmp_path / "wide.pt", ModelConfig(1, 320, 20))  # embeddings as wide as the smallest ESM-2's
    store = small_store(tmp_path / "wide.pt")
    store.ingest("a", random_proteins(50, 50, 500))
    store.ingest("b", random_proteins(20, 50, 500, seed=1) | {"x": "M-K"})
    sizes, kinds = {"job_seconds": 0.2, "shard_bytes": 2_000_000}, ["h5", "pt", "biotrainer", "parquet"]
    made = forecast_of(store, sizes, exports=kinds)
    before = bytes_in(store.path)
    store.run(**sizes)
    assert (len(store.jobs), len(store.shard_files())) == (made["work"]["jobs"], made["work"]["shards"])
    assert len(store.shard_files()) > 4
    assert bytes_in(store.path / "shards") == made["disk"]["embeddings_bytes"]
    alone = made["disk"]["needed_bytes"] - made["disk"]["report_bytes"] - made["disk"]["exports_bytes"]
    written = bytes_in(store.path) - before
    assert alone == pytest.approx(written, rel=0.02)
    for dataset in store.datasets:
        for kind in kinds:
            export(store.path / "datasets" / dataset, kind)
    exported = bytes_in(store.path) - before - written
    assert made["disk"]["exports_bytes"] == pytest.approx(exported, rel=0.02)
    assert made["disk"]["exports_bytes"] > exported


@pytest.mark.parametrize("other", [{"storage_dtype": "float16"}, {"outputs": ["mean"]}], ids=str)
def test_the_bytes_of_a_smaller_way_to_store_are_what_that_store_has(small_store, random_proteins, other):
    chosen = {"storage_dtype": "float32"}
    stores = [small_store(**chosen), small_store(**chosen | other)]
    for store in stores:
        store.ingest("a", random_proteins(60))
    stores[1].run(**SIZES)
    wanted = {key: stores[1].settings[key] for key in ("storage_dtype", "outputs")}
    (way,) = [w for w in forecast_of(stores[0])["disk"]["ways"] if {key: w[key] for key in wanted} == wanted]
    assert way["bytes"] == bytes_in(stores[1].path / "shards")


def test_what_to_store_instead_is_said_where_the_work_does_not_fit(small_store, random_proteins, full_disk):
    store = small_store(storage_dtype="float32")
    store.ingest("a", random_proteins(2000))
    assert "instead" not in forecast.text(forecast_of(store))
    needed = forecast_of(store)["disk"]["needed_bytes"]
    full_disk(needed - 1)
    lines = [line.strip() for line in forecast.text(forecast_of(store)).splitlines() if "instead" in line]
    assert [line.rpartition(":")[0] for line in lines] == [
        "instead: residue and mean, residues in float16",
        "instead: mean alone",
    ]
    full_disk(1000)
    assert forecast.text(forecast_of(store)).count("which does not fit either") == 2


def test_what_is_finished_is_no_work(store):
    whole = forecast_of(store)["work"]
    assert (whole["finished_sequences"], whole["sequences"]) == (0, 60)
    store.plan(**SIZES)
    first, second = store.jobs["job"][:2]
    done = [store.embed(job) for job in (first, second)]
    job_record_path(store.path, second).unlink()  # as if killed just before it
    left = forecast_of(store)["work"]
    assert left["finished_sequences"] == sum(job_record["sequences"] for job_record in done)
    assert left["residues"] == whole["residues"] - sum(job_record["residues"] for job_record in done)
    assert left["jobs"] < whole["jobs"]
    store.run()
    work = forecast_of(store)["work"]
    assert (work["sequences"], work["residues"], work["shards"], work["jobs"]) == (0, 0, 0, 0)
    made = forecast_of(store)
    assert "To embed    nothing; 60 are finished" in forecast.text(made)
    assert "Memory" not in forecast.text(made)


def test_a_sequence_of_two_datasets_is_embedded_once(store, random_proteins):
    store.ingest("b", random_proteins(60))
    made = forecast_of(store)
    assert [row["accepted"] for row in made["datasets"]] == [60, 60]
    assert made["work"]["sequences"] == 60


def test_records_and_lengths_are_told_for_each_dataset(small_store):
    store = small_store()
    lengths = [1, 29, 30, 399, 400, 1022, 1023, 1600, 12_000]
    proteins = {f"p{n}": "M" * n for n in lengths}
    store.ingest("a", proteins | {"again": "M", "bad": "M-K", "none": ""})
    (row,) = forecast_of(store)["datasets"]
    assert (row["records"], row["accepted"], row["duplicate"], row["rejected"]) == (12, 9, 1, 2)
    assert row["reasons"] == {"invalid_byte": 1, "empty": 1}
    assert (row["shortest"], row["median"], row["longest"], row["beyond_trained"]) == (1, 400, 12_000, 3)
    text = forecast.text(forecast_of(store))
    assert "1 invalid_byte, 1 empty" in text
    assert "3 longer than the 1,022 residues" in text


def test_a_dataset_without_an_accepted_record_needs_nothing(small_store):
    store = small_store()
    store.ingest("a", {"x": "M-K"})
    made = forecast_of(store)
    assert (made["work"]["jobs"], made["disk"]["embeddings_bytes"], made["time"][0]["seconds"]) == (0, 0, 0)
    assert "0 accepted" in forecast.text(made)


@pytest.mark.parametrize(
    "settings", [{}, {"outputs": ["mean"]}, {"layers": [0, 1, 2], "storage_dtype": "float32"}], ids=str
)
def test_memory_for_a_token_is_what_the_engine_reckons_with(small_store, tiny_checkpoint, settings):
    made = small_store(**settings).settings
    output = Output(tuple(made["layers"]), tuple(made["outputs"]), made["storage_dtype"])
    engine = Engine(tiny_checkpoint, torch.device("cpu"), "float32", output)
    assert TINY.bytes_per_token(4, forecast._result_bytes(made)) == engine.bytes_per_token


def test_what_the_loaded_weights_took_in_this_store_is_what_they_will_take(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(60))
    store.plan(**SIZES)
    job_record = store.embed(store.jobs["job"][0])
    assert job_record["loaded_bytes"] > 50e6
    memory = forecast_of(store)["memory"]
    assert (memory["loaded_bytes"], memory["loaded_measured"]) == (job_record["loaded_bytes"], True)
    path = job_record_path(store.path, job_record["job"])
    write_json(path, {key: value for key, value in job_record.items() if key != "loaded_bytes"})
    memory = forecast_of(store)["memory"]  # of an earlier version
    assert (memory["loaded_bytes"], memory["loaded_measured"]) == (
        int(forecast.PROCESS_BYTES) + memory["weights_bytes"],
        False,
    )


def test_weights_to_download_are_told_until_they_are_there(store, tmp_path):
    weights = tmp_path / "not" / "there.pt"
    made = forecast_of(store, weights=weights)
    assert made["disk"]["download"]["bytes"] == 4 * TINY.parameters
    assert str(weights) in forecast.text(made)
    weights.parent.mkdir()
    weights.write_bytes(b"")
    assert forecast_of(store, weights=weights)["disk"]["download"] is None


def test_the_weights_are_counted(tiny_checkpoint):
    model = checkpoint.load_model(tiny_checkpoint, torch.device("cpu"), torch.float32, pack=False)
    assert TINY.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_streamed_weights_are_forecast_to_take_less(store):
    wide = {"num_layers": 36, "embed_dim": 2560, "attention_heads": 40}
    folders = {name: store.inputs(name) for name in store.datasets}

    def memory(residency):
        made = forecast.forecast(store.path, store.settings | wide, folders, Sizes(**SIZES), residency=residency)
        return made["memory"]["batch_bytes"]

    assert memory("streamed") < 0.5 * memory("auto") == 0.5 * memory("resident")


def test_a_gpus_streamed_weights_need_the_memory_of_one_batch_in_a_wave(small_store):
    store = small_store()
    store.ingest("a", {f"p{n}": "M" * (30_000 + n) for n in range(40)})  # a wave of 30 GB, if there is room
    huge = {"num_layers": 48, "embed_dim": 5120, "attention_heads": 40, "device": "cuda", "precision": "bfloat16"}
    folders, sizes = {"a": store.inputs("a")}, Sizes(1e6, 1 << 40)
    made = forecast.forecast(store.path, store.settings | huge, folders, sizes, residency="streamed")
    assert made["work"]["jobs"] == 1
    assert 4e9 < made["memory"]["batch_bytes"] < 8e9


def on_card(store, card: str, sizes: dict = SIZES, **settings) -> dict:
    folders = {name: store.inputs(name) for name in store.datasets}
    return forecast.forecast(store.path, store.settings | settings, folders, Sizes(**sizes), device_like=card)


def test_a_card_that_is_asked_for_is_said_the_memory_and_time_of(small_store):
    store = small_store()
    store.ingest("a", {"short": "M" * 50, "long": "M" * 3000})
    plain, asked = forecast_of(store), on_card(store, "A100-40GB")
    assert "card" not in plain["memory"]
    assert asked["memory"] == plain["memory"] | {"card": asked["memory"]["card"]}
    assert (plain["time"], asked["time"][:-1]) == (plain["time"][:1], plain["time"])
    time = asked["time"][-1]
    assert (time["device"], time["precision"], time["source"]) == ("A100-40GB", "float16", throughput.ASSUMED)
    assert 3 * time["seconds_low"] == pytest.approx(time["seconds"], abs=0.01)
    assert 3 * time["seconds"] == pytest.approx(time["seconds_high"], abs=0.01)
    assert "A100-40GB" not in forecast.text(plain)
    assert "on A100-40GB, float16: " in forecast.text(asked)
    assert "all fit" in forecast.text(asked)


def test_the_sequences_beyond_a_card_are_counted(small_store):
    store = small_store()
    store.ingest("a", {"short": "M" * 50, "long": "M" * 30_000, "longer": "M" * 200_000})
    shape = MODELS["esm2_t36_3B_UR50D"]
    on_t4 = on_card(store, "T4-16GB", num_layers=36, embed_dim=2560, attention_heads=40)
    card = on_t4["memory"]["card"]
    fits = 0.9 * 16e9 - 2 * shape.parameters
    per_token = shape.bytes_per_token(2, 2 * 2560)
    assert per_token * (card["longest_residues"] + 2) <= fits < per_token * (card["longest_residues"] + 3)
    assert 30_000 < card["longest_residues"] < 200_000
    assert card["sequences_beyond"] == 1
    assert "1 sequence beyond it" in forecast.text(on_t4)
    assert card["batch_bytes"] == 2 * shape.parameters + card["batch_tokens"] * per_token <= 16e9
    huge = {"num_layers": 48, "embed_dim": 5120, "attention_heads": 40, "device": "cuda", "precision": "bfloat16"}
    on_t4 = on_card(store, "T4-16GB", **huge)  # 30 GB of weights
    card = on_t4["memory"]["card"]
    assert (card["precision"], card["streamed"]) == ("bfloat16", True)
    assert 30_000 < card["longest_residues"] < 200_000
    assert card["batch_bytes"] < 16e9
    assert re.search(r"weights \(30\.\d GB\) streamed; .* for a batch", forecast.text(on_t4))


def test_streamed_weights_are_read_beside_the_work_and_resident_ones_before_it(small_store):
    store = small_store()
    store.ingest("a", {"short": "M" * 50})
    huge = {"num_layers": 48, "embed_dim": 5120, "attention_heads": 40, "device": "cuda", "precision": "bfloat16"}
    one_job = {"job_seconds": 1200.0, "shard_bytes": 1 << 30}
    reading = 4 * MODELS["esm2_t48_15B_UR50D"].parameters / throughput.READ_BYTES_PER_SECOND
    for card, seconds in (("H200-141GB", reading), ("T4-16GB", reading + reading / 48)):
        made = on_card(store, card, one_job, **huge)
        assert made["time"][-1]["seconds"] == pytest.approx(seconds, rel=1e-3)
    folders = {name: store.inputs(name) for name in store.datasets}
    sizes = Sizes(**one_job)
    by_config = forecast.forecast(store.path, store.settings | huge, folders, sizes, residency="streamed")
    assert by_config["time"][0]["seconds"] == pytest.approx(seconds, rel=1e-3)


def test_the_cards_are_those_that_the_config_takes(refused):
    schema = ROOT / "workflow/schemas/config.schema.yaml"
    for card in throughput.CARDS:
        assert config.validate({"inputs": ["a"], "device_like": card}, schema)["device_like"] == card
    with refused("config: device_like: 'A100'", *throughput.CARDS):
        config.validate({"inputs": ["a"], "device_like": "A100"}, schema)
    documented = (ROOT / "config/README.md").read_text()
    assert [card for card in throughput.CARDS if f"`{card}`" not in documented] == []


def test_a_named_model_is_forecast_without_its_weights(tmp_path, store):
    asked = config.validate(
        {"inputs": ["a"], "model": "esm2_t33_650M_UR50D", "device": "cuda"},
        ROOT / "workflow/schemas/config.schema.yaml",
    )
    settings = expected(tmp_path / "new", asked, "cpu")
    assert (settings["precision"], settings["layers"]) == ("float16", [33])
    (tmp_path / "new").mkdir()
    made = forecast.forecast(tmp_path / "new", settings, {"a": store.inputs("a")}, Sizes(1200, 1 << 30), "auto")
    assert made["work"]["sequences"] == 60
    assert made["memory"]["weights_bytes"] == pytest.approx(
        2 * 651e6, rel=0.01
    )  # the model's name, and its paper's table
    assert made["time"][0]["source"] == throughput.ASSUMED


def test_a_store_that_is_there_says_its_own_settings(store):
    assert expected(store.path, store.config, "cuda") == store.settings


def test_what_does_not_fit_is_told_and_refused(store, full_disk, refused):
    jobs = store.plan(**SIZES)
    needed = int(jobs["forecast_bytes"].sum())
    full_disk(needed)
    require_space(store.path, jobs)
    full_disk(needed - 1)
    with refused(str(store.path), "to be written", "are free", "disk_space: ignore"):
        require_space(store.path, jobs)
    made = forecast_of(store)
    assert not made["disk"]["fits"]
    assert "DOES NOT FIT" in forecast.text(made)


def test_exports_need_room_too_until_they_are_there(store, full_disk, refused):
    jobs = store.plan(**SIZES)
    kinds, datasets = ["h5", "pt", "biotrainer", "parquet"], ["a"]
    alone = forecast_of(store)["disk"]["needed_bytes"]
    disk = forecast_of(store, exports=kinds)["disk"]
    exported = missing_bytes(store.path, store.settings, datasets, kinds)
    assert disk["needed_bytes"] == alone + exported == alone + disk["exports_bytes"]
    assert "for exports" in forecast.text(forecast_of(store, exports=kinds))
    for free, fits in [(disk["needed_bytes"], True), (disk["needed_bytes"] - 1, False)]:
        full_disk(free)
        disk = forecast_of(store, exports=kinds)["disk"]
        assert (disk["fits"], disk["ways"][0]["fits"]) == (fits, fits)
    needed = int(jobs["forecast_bytes"].sum()) + exported
    full_disk(needed)
    require_space(store.path, jobs, exported)
    full_disk(needed - 1)
    with refused("to be written", "of them for exports"):
        require_space(store.path, jobs, exported)
    full_disk(10**12)
    store.run(**SIZES)
    for kind in kinds:
        export(store.path / "datasets" / "a", kind)
    assert bytes_in(store.path / "datasets" / "a" / "exports") <= exported
    assert missing_bytes(store.path, store.settings, datasets, kinds) == 0


def test_only_what_is_not_yet_written_needs_room(store, full_disk, refused):
    jobs = store.plan(**SIZES)
    first, second = jobs["job"][:2]
    store.embed(first)
    store.embed(second)
    job_record_path(store.path, second).unlink()
    left = int(jobs[~jobs["job"].isin([first, second])]["forecast_bytes"].sum())
    full_disk(left)
    require_space(store.path, jobs)
    full_disk(left - 40_000)  # the second job's shards have headers besides
    with refused("to be written"):
        require_space(store.path, jobs)


def test_where_every_record_is_rejected_there_is_a_whole_dataset_of_none_and_no_work(small_store):
    store = small_store()
    store.ingest("none", {"a\x1b[31m\x9b": "---", "b": "XXX"})
    jobs = store.plan()
    require_space(store.path, jobs)
    assert unfinished_jobs(store.path, jobs)["forecast_bytes"].sum() == 0
    made = forecast_of(store)
    assert "nothing" in forecast.text(made)
    assert (made["work"]["sequences"], made["work"]["jobs"]) == (0, 0)
    assert store.assemble("none")["rejected"] == 2
    rows = (store.path / "datasets/none/rejected.tsv").read_text().splitlines()
    assert [row.split("\t")[1] for row in rows] == ["id", r"a\x1b[31m\x9b", "b"]
    dataset = store.open("none")
    assert (len(dataset), dataset.ids, dataset.pooled("mean").shape) == (0, [], (0, TINY.embed_dim))
    assert dataset.records["status"].tolist() == ["rejected", "rejected"]


def shards_that_took(store, product: float, attention: float, factors) -> None:
    """Job records and metrics of a job for each factor: batches of all lengths that took so long for an operation."""
    for number, factor in enumerate(factors):
        rows = []
        for length in (30, 100, 300, 1000):
            n = 4000 // length
            operations = np.array([TINY.flops(length) - TINY.attention_flops(length), TINY.attention_flops(length)]) * n
            row = dict.fromkeys(METRICS.names) | {"job": f"job{number}", "shard": f"s{number}", "n_sequences": n}
            row |= {"n_tokens": n * (length + 2), "wall_ms": 1000 * factor * (operations @ [product, attention])}
            rows.append(row | {"device": "Abacus", "precision": "float32"})
        write_metrics(metrics_path(store.path, f"s{number}"), rows)
        path = job_record_path(store.path, f"job{number}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"made": [f"s{number}"], "device": "Abacus", "load_seconds": 2.0}))


def test_what_finished_jobs_took_is_what_the_rest_will_take(store):
    shards_that_took(store, 1e-9, 5e-9, [1.0] * 6)
    (rate, *_) = throughput.rates(store.path, store.settings, TINY, threads=2)
    assert (rate.source, rate.device, rate.load_seconds) == (throughput.HERE, "Abacus", 2.0)
    for length in (50, 3000):
        attention = TINY.attention_flops(length)
        expected_seconds = (TINY.flops(length) - attention) * 1e-9 + attention * 5e-9
        assert rate.seconds(TINY, np.array([length]))[0] == pytest.approx(expected_seconds, rel=1e-6)


def test_the_range_is_the_spread_of_the_jobs(store):
    shards_that_took(store, 1e-9, 1e-9, np.linspace(0.5, 1.5, 21))
    (rate, *_) = throughput.rates(store.path, store.settings, TINY, threads=2)
    assert (rate.low, rate.high) == pytest.approx((0.6, 1.4), rel=0.02)


def test_of_few_jobs_the_range_is_assumed_and_said_to_be(store):
    shards_that_took(store, 1e-9, 1e-9, [1.0, 1.0])
    (rate, *_) = throughput.rates(store.path, store.settings, TINY, threads=2)
    assert "too few" in rate.basis
    assert rate.high == 1.5


def test_the_time_of_a_real_run_is_taken_from_its_metrics(store):
    store.plan(**SIZES)
    store.embed_all()
    job_records = [json.loads(path.read_text()) for path in (store.path / "jobs").iterdir()]
    (rate,) = throughput.measured_here(store.path, store.settings, TINY)
    lengths = np.concatenate([store.work_order(job)["length"].to_numpy() for job in store.jobs["job"]])
    assert rate.device == job_records[0]["device"]
    assert rate.seconds(TINY, lengths).sum() == pytest.approx(sum(c["embed_seconds"] for c in job_records), rel=0.1)


def test_every_named_model_has_a_rate_on_either_device(tmp_path):
    for shape in MODELS.values():
        for device in ("cpu", "cuda"):
            for precision in ("float32", "float16", "bfloat16"):
                (rate, *_) = throughput.rates(tmp_path, {"device": device, "precision": precision}, shape, threads=8)
                assert rate.source != throughput.HERE
                assert 0 < rate.low < 1 < rate.high
                assert rate.seconds(shape, np.array([300]))[0] > 0


def test_a_forecast_is_written_as_json_and_as_text(store):
    folder = store.path / "forecast"
    forecast.write(forecast_of(store), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["forecast.json", "forecast.txt"]
    assert json.loads((folder / "forecast.json").read_text())["work"]["sequences"] == 60
    since = (folder / "forecast.txt").stat().st_mtime
    assert any("60 sequences" in line for line in forecast_lines_of(store.path, since))
    assert forecast_lines_of(store.path, since + 1) == []
