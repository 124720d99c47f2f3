"""A store's settings: resolved once, then guarded; what is not comparable never gets in."""

import os

import pytest

from lengthwise.esm2 import sources
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.download import fetch
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.store import settings
from lengthwise.system.files import read_json, write_json

RECEIPT = {
    "sha256": "a" * 64,
    "num_layers": 6,
    "embed_dim": 320,
    "attention_heads": 20,
    "random_weights": False,
}
CONFIG = {
    "model": "esm2_t6_8M_UR50D",
    "device": "auto",
    "precision": "auto",
    "storage_dtype": "float16",
    "layers": [-1],
    "default_layer": "auto",
    "outputs": ["residue", "mean"],
    "batch_tokens": "auto",
    "job_minutes": 20,
    "shard_bytes": 1 << 30,
    "long_sequences": {"policy": "full", "max_residues": 1022},
}


@pytest.fixture
def store(tmp_path):
    """A store of CONFIG on a CPU with an embedding."""
    settings.create_or_check(tmp_path, CONFIG, RECEIPT, "cpu")
    add_shard(tmp_path)
    return tmp_path


def add_shard(store):
    (store / "shards" / "ab").mkdir(parents=True)
    (store / "shards" / "ab" / "abcd.safetensors").touch()


def check(store, receipt=RECEIPT, auto_device="cpu", **changes) -> dict:
    return settings.create_or_check(store, {**CONFIG, **changes}, receipt, auto_device)


@pytest.mark.parametrize(
    ("asked", "auto_device", "device", "precision"),
    [
        ({}, "cpu", "cpu", "float32"),
        ({}, "cuda", "cuda", "float16"),
        ({"device": "cpu"}, "cuda", "cpu", "float32"),
        ({"device": "cuda"}, "cpu", "cuda", "float16"),
        ({"precision": "bfloat16"}, "cpu", "cpu", "bfloat16"),
        ({"precision": "float32"}, "cuda", "cuda", "float32"),
    ],
    ids=str,
)
def test_auto_becomes_what_the_machine_has(tmp_path, asked, auto_device, device, precision):
    made = check(tmp_path, auto_device=auto_device, **asked)
    assert (made["device"], made["precision"]) == (device, precision)


def test_auto_means_what_the_store_says_from_then_on(store):
    assert check(store, auto_device="cuda") == read_json(store / "settings.json")
    assert check(store)["precision"] == "float32"


@pytest.mark.parametrize(
    ("layers", "resolved"),
    [
        ([-1], [6]),
        ([0], [0]),
        ([6, 0, 3], [6, 0, 3]),
        ([-7], [0]),
        ([-1, 6, -2], [6, 5]),
        ([-7, -6, -5, -4, -3, -2, -1], [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_layers_become_absolute_and_distinct_in_the_order_given(layers, resolved):
    assert settings.resolve_layers(layers, 6) == resolved


@pytest.mark.parametrize("layer", [7, -8, 33])
def test_a_layer_that_the_model_has_not_is_one_line(refused, layer):
    with refused("config: layers", f" {layer} ", "0 to 6", "-7 to -1"):
        settings.resolve_layers([-1, layer], 6)


def test_the_order_of_layers_and_outputs_changes_no_number(tmp_path):
    one = check(tmp_path / "one", layers=[2, -1], outputs=["mean", "residue"])
    other = check(tmp_path / "other", layers=[6, 2], outputs=["residue", "mean"])
    assert one["fingerprint"] == other["fingerprint"]
    assert check(tmp_path / "one", layers=[2, 6], outputs=["residue", "mean"]) == one


@pytest.mark.parametrize(
    ("asked", "layers"),
    [
        ({"layers": [0, -1]}, [6, 0]),
        ({"layers": [3, 0, -1]}, [6, 3, 0]),
        ({"layers": [0, 3, -1], "default_layer": 3}, [3, 6, 0]),
        ({"layers": [0, 3, 6], "default_layer": -7}, [0, 6, 3]),
    ],
    ids=str,
)
def test_a_new_store_reads_its_highest_layer_unless_told_otherwise(tmp_path, asked, layers):
    made = check(tmp_path, **asked)
    assert made["layers"] == layers
    assert read_json(tmp_path / "settings.json")["layers"] == layers


def test_a_store_of_before_keeps_its_first_layer(tmp_path):
    made = check(tmp_path, layers=[2, 6])
    write_json(tmp_path / "settings.json", {**made, "layers": [2, 6]})  # as an earlier version wrote it
    add_shard(tmp_path)
    for layers in ([2, 6], [6, 2], [-1, 2]):
        assert check(tmp_path, layers=layers)["layers"] == [2, 6]
    assert check(tmp_path, layers=[2, 6], default_layer=2)["layers"] == [2, 6]
    assert read_json(tmp_path / "settings.json")["layers"] == [2, 6]


def test_another_default_layer_is_refused_once_there_is_an_embedding(tmp_path, refused):
    check(tmp_path, layers=[2, 6], default_layer=2)
    assert check(tmp_path, layers=[2, 6], default_layer=6)["layers"] == [6, 2]
    add_shard(tmp_path)
    assert check(tmp_path, layers=[2, 6])["layers"] == [6, 2]
    with refused("default_layer is 6 there and 2 in the config", "ds.layer(2) reads it", "Set the config back"):
        check(tmp_path, layers=[2, 6], default_layer=-5)


@pytest.mark.parametrize(("default", "words"), [(3, ["is not stored", "[6, 2]"]), (7, ["does not exist", "0 to 6"])])
def test_a_default_layer_that_is_not_stored_is_one_line(tmp_path, refused, default, words):
    with refused("config: default_layer", f" {default} ", *words):
        check(tmp_path, layers=[2, 6], default_layer=default)


COMPARABLE_CHANGES = [
    pytest.param({"layers": [-1, 3]}, ["layers", "[6]", "[6, 3]"], id="layers"),
    pytest.param({"precision": "float16"}, ["precision", "float32", "float16"], id="precision"),
    pytest.param({"storage_dtype": "float32"}, ["storage_dtype", "float16", "float32"], id="storage_dtype"),
    pytest.param({"outputs": ["mean"]}, ["outputs", "[residue, mean]", "[mean]"], id="outputs"),
]


@pytest.mark.parametrize(("changes", "words"), COMPARABLE_CHANGES)
def test_a_change_of_what_makes_embeddings_comparable_is_refused_with_both_values(store, refused, changes, words):
    before = (store / "settings.json").read_bytes()
    with refused(str(store), *words):
        check(store, **changes)
    assert (store / "settings.json").read_bytes() == before


def test_other_weights_are_refused_with_both_hashes(store, refused):
    with refused("weights_sha256", "aaaaaaaaaaaa...", "bbbbbbbbbbbb..."):
        check(store, receipt={**RECEIPT, "sha256": "b" * 64})


def test_an_engine_of_other_numerics_is_refused_with_both_values(store, refused, monkeypatch):
    monkeypatch.setattr(settings, "NUMERICS", settings.NUMERICS + 1)
    with refused(f"numerics is {settings.NUMERICS - 1} there and {settings.NUMERICS}"):
        check(store)


def test_all_differences_are_named_at_once(store, refused):
    with refused("layers", "precision", "storage_dtype", "outputs"):
        check(store, layers=[0], precision="bfloat16", storage_dtype="float32", outputs=["bos"])


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_tokens": 64},
        {"job_minutes": 1},
        {"shard_bytes": 65_536},
        {"long_sequences": {"policy": "skip", "max_residues": 10}},
        {"device": "cuda"},
        {"layers": [6]},
        {"outputs": ["mean", "residue"]},
        {"precision": "float32"},
    ],
    ids=str,
)
def test_a_change_of_anything_else_keeps_the_store(store, changes):
    before = (store / "settings.json").read_bytes()
    assert check(store, **changes) == read_json(store / "settings.json")
    assert (store / "settings.json").read_bytes() == before


def test_each_comparable_setting_has_a_part_in_the_fingerprint(store):
    stored = read_json(store / "settings.json")
    prints = {settings.fingerprint({**stored, key: "other"}) for key in settings.COMPARABLE}
    assert len(prints | {settings.fingerprint(stored)}) == len(settings.COMPARABLE) + 1


def test_there_are_no_settings_where_there_is_no_store(tmp_path):
    assert settings.load(tmp_path) is None
    assert settings.guard(tmp_path / "none", CONFIG) is None


@pytest.mark.parametrize("key", settings.COMPARABLE)
def test_a_store_whose_settings_were_edited_by_hand_is_refused(store, refused, key):
    write_json(store / "settings.json", {**read_json(store / "settings.json"), key: "other"})
    with refused("settings.json", "edited by hand"):
        settings.load(store)


def test_a_store_without_an_embedding_takes_new_settings(tmp_path):
    check(tmp_path)
    changes = {"precision": "bfloat16", "layers": [0, -1], "storage_dtype": "float32", "outputs": ["mean"]}
    assert settings.guard(tmp_path, {**CONFIG, **changes}) is None
    assert settings.expected(tmp_path, {**CONFIG, **changes}, "cpu")["outputs"] == ["mean"]
    made = check(tmp_path, **changes)
    assert made == read_json(tmp_path / "settings.json") == settings.guard(tmp_path, {**CONFIG, **changes})
    assert (made["precision"], made["layers"]) == ("bfloat16", [6, 0])


@pytest.mark.parametrize("holder", ["plan/inputs.json", "datasets/a/manifest.json"])
@pytest.mark.parametrize("damage", [b"", None, b"{"], ids=["empty", "gone", "half"])
def test_lost_settings_are_read_from_a_copy(store, holder, damage):
    stored = read_json(store / "settings.json")
    write_json(store / holder, {"settings": stored})
    (store / "settings.json").unlink() if damage is None else (store / "settings.json").write_bytes(damage)
    assert settings.load(store) == stored


@pytest.mark.parametrize(
    "drop",
    [
        pytest.param([], id="with-every-key"),
        pytest.param(
            ["outputs"],
            id="with-a-key-less",
        ),
    ],
)
def test_a_newer_store_is_refused_as_newer(store, refused, drop):
    stored = {**read_json(store / "settings.json"), "schema": settings.SCHEMA + 1}
    write_json(store / "settings.json", {key: value for key, value in stored.items() if key not in drop})
    with refused("settings.json", "newer Lengthwise", f"schema {settings.SCHEMA + 1}"):
        settings.load(store)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"schema": 1, "fing', id="half"),
        pytest.param(b"{}", id="no-keys"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe\x00", id="no-text"),
        pytest.param(b"\x00" * 400, id="zeros"),
    ],
)
def test_damaged_settings_are_one_line(store, refused, content):
    (store / "settings.json").write_bytes(content)
    with refused("settings.json", "damaged"):
        settings.load(store)


def test_settings_whose_schema_is_no_number_are_one_line(store, refused):
    write_json(store / "settings.json", {**read_json(store / "settings.json"), "schema": "one"})
    with refused("settings.json", "damaged"):
        settings.load(store)


@pytest.fixture
def own_checkpoint(tmp_path):
    """A store of a checkpoint given by path, as (store, config, path of the checkpoint)."""
    path, store = tmp_path / "own.pt", tmp_path / "store"
    write_random(path, ModelConfig(2, 32, 2))
    config, receipt = {**CONFIG, "model": str(path)}, fetch(str(path), "")
    settings.create_or_check(store, config, receipt, "cpu")
    write_json(store / "weights.json", receipt)
    add_shard(store)
    return store, config, path


def test_a_checkpoint_replaced_in_place_is_refused(own_checkpoint, refused):
    store, config, path = own_checkpoint
    write_random(path, ModelConfig(2, 32, 2), seed=1)
    with refused("weights_sha256"):
        settings.guard(store, config)


def test_a_checkpoint_with_another_time_is_the_same_checkpoint(own_checkpoint):
    store, config, path = own_checkpoint
    os.utime(path, (1, 1))
    assert settings.guard(store, config) == read_json(store / "settings.json")


def test_a_checkpoint_that_did_not_change_is_not_hashed_again(own_checkpoint, monkeypatch):
    store, config, _ = own_checkpoint
    monkeypatch.setattr(sources, "sha256", lambda path: pytest.fail("it was hashed again"))
    assert settings.guard(store, config) is not None


@pytest.mark.parametrize("text", ["", "{}"])
def test_a_damaged_receipt_of_the_checkpoint_ends_no_run(own_checkpoint, refused, text):
    store, config, path = own_checkpoint
    (store / "weights.json").write_text(text)
    assert settings.guard(store, config) == read_json(store / "settings.json")
    write_random(path, ModelConfig(2, 32, 2), seed=1)
    with refused("weights_sha256"):
        settings.guard(store, config)
