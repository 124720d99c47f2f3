"""Stores of models in transformers' layout: rows, identity, provenance, and what changes under them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import EsmForMaskedLM, EsmForSequenceClassification

import hugging_face
from lengthwise.esm2.download import fetch
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.maintain.verify import verify
from lengthwise.store import settings as settings_module
from lengthwise.store.paths import store_name
from lengthwise.store.weights import note_new_time, origin, require_unchanged
from lengthwise.system.files import read_json, write_json

PROTEINS = {"a": "MKVLAWSTRE", "b": "MKTAYIAKQRQISFVKSHFSRQ"}


@pytest.fixture(scope="module", params=[("5GB", EsmForMaskedLM), ("20kB", EsmForSequenceClassification)])
def store(request, tmp_path_factory, small_store):
    """A store of a model in one file, without rotary frequencies; and one of a model in several, with them."""
    shard_size, kind = request.param
    folder = tmp_path_factory.mktemp("model") / "tuned"
    hugging_face.write(folder, ModelConfig(2, 32, 2), kind, shard_size=shard_size)
    if kind is EsmForMaskedLM:
        hugging_face.change(folder, hugging_face.without_frequencies)
    store = small_store(folder, storage_dtype="float32", parity="fail")
    store.ingest("a", PROTEINS)
    store.run()
    return store


def is_one_file(store) -> bool:
    return (Path(store.config["model"]) / "model.safetensors").exists()


@pytest.fixture
def changed(store, tmp_path):
    """The same store of a copy of the model, which may be changed."""
    model = Path(shutil.copytree(store.config["model"], tmp_path / "tuned"))
    other = store.copy(tmp_path / "store")
    write_json(other.path / "weights.json", read_json(other.path / "weights.json") | {"path": str(model)})
    note_new_time(other.path)  # from here on checksums are taken again only of what changes
    other.config = {**other.config, "model": str(model)}
    return other


def test_rows_are_those_of_transformers_and_the_receipt_of_a_comparison_with_fair_esm_passes(store):
    dataset = store.open("a")
    for name, sequence in PROTEINS.items():
        theirs = hugging_face.rows(Path(store.config["model"]), sequence.encode(), [2])[2][1:-1]
        assert np.abs(dataset[name] - theirs).max() <= 2e-5 * np.sqrt(np.mean(np.square(theirs)))
    (maker,) = dataset.manifest["made_by"]
    assert maker["parity"]["engine"]["share_of_limit"] < 1


def test_settings_and_manifest_say_where_weights_and_frequencies_are_from(store):
    settings, manifest = read_json(store.path / "settings.json"), store.open("a").manifest
    assert settings["inv_freq"] == ("computed" if is_one_file(store) else "file")
    assert settings["weights_sha256"] == manifest["weights"]["sha256"] == store.receipt["sha256"]
    assert manifest["weights"]["origin"] == store.config["model"]
    assert not settings["random_weights"]
    assert not [problem for result in verify(store.path) for problem in result.problems]


def test_a_file_that_is_named_like_a_downloads_record_is_none(changed):
    model = Path(changed.config["model"])
    model.with_name("tuned.json").write_text('{"learning_rate": 1e-4}')
    assert fetch(str(model), "unused")["sha256"] == changed.receipt["sha256"]
    assert origin(changed.path) == changed.receipt["model"]


def test_a_model_of_the_hub_is_in_the_manifest_by_id_revision_and_address(changed):
    hub = {"id": "org/tiny", "revision": "v1", "commit": "abc", "address": "https://hub.example"}
    write_json(changed.path / "weights.json", read_json(changed.path / "weights.json") | {"hub": hub})
    changed.assemble("a")
    weights = changed.open("a").manifest["weights"]
    assert weights["hub"] == hub
    assert weights["origin"] == origin(changed.path) == "https://hub.example/org/tiny at abc"
    assert "https://hub.example/org/tiny at abc" in (changed.path / "datasets" / "a" / "README.md").read_text()


def test_another_file_in_the_folder_is_another_model(changed, refused):
    model, expected = Path(changed.config["model"]), changed.receipt["sha256"]
    assert require_unchanged(changed.path, expected) == model
    file = sorted(model.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with refused("is not the checkpoint"):
        require_unchanged(changed.path, expected)
    with refused("weights_sha256 is"):
        settings_module.guard(changed.path, changed.config)


def test_other_heads_in_config_json_are_refused(changed, refused):
    """No checksum of the weights tells how many there are, and no tensor where rotary frequencies are computed."""
    path = Path(changed.config["model"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 4}))
    receipt = read_json(changed.path / "weights.json")
    with refused("attention_heads is 2 there and 4"):
        settings_module.guard(changed.path, changed.config, receipt | {"attention_heads": 4})
    changed.ingest("b", {"c": "MKVLA"})
    changed.plan()
    with refused("config.json has other sizes" if is_one_file(changed) else "inv_freq is (8,) and should be (4,)"):
        changed.embed_all()


def test_a_store_from_before_has_no_word_of_frequencies_and_extends(store, tmp_path):
    old = store.copy(tmp_path / "old")
    settings = read_json(old.path / "settings.json")
    del settings["inv_freq"]
    write_json(old.path / "settings.json", settings)
    assert settings_module.create_or_check(old.path, old.config, old.receipt, "cpu") == settings


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("facebook/esm2_t6_8M_UR50D", "facebook--esm2_t6_8M_UR50D"),
        ("org/name@refs/pr/1", "org--name--refs--pr--1"),
        ("weights/tiny.pt", "tiny"),
        ("weights/tuned/model.safetensors", "tuned"),
        ("weights/own.safetensors", "own"),
        ("/weights/My model/model.safetensors", "My_model"),
        ("esm2_t6_8M_UR50D", "esm2_t6_8M_UR50D"),
    ],
)
def test_the_name_of_a_store(model, name):
    assert store_name(model) == name


def test_a_folder_gives_its_name_to_the_store(tmp_path, monkeypatch):
    (tmp_path / "lab" / "tuned").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert store_name("lab/tuned") == "tuned"
    monkeypatch.chdir(tmp_path / "lab" / "tuned")
    assert store_name("./") == "tuned"
