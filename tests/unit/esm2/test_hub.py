"""Models of the Hugging Face hub, by its own library in a process of its own: a server on this machine plays the hub."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import EsmForSequenceClassification
from transformers.models.esm.configuration_esm import get_default_vocab_list

import hugging_face
from hub_server import Hub
from lengthwise.esm2.shapes import ModelConfig

TINY = ModelConfig(2, 32, 2)
CHUNK_BYTES = 1000
# Its address, cache and mode are read when the library is imported. Retries need no waiting here.
SCRIPT = """
import json, sys, time
time.sleep = lambda seconds: None
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = int(sys.argv[2])
from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import download
download.OFFICIAL_URL = sys.argv[3]
for call in json.loads(sys.argv[1]):
    try:
        result = download.fetch(**call)
    except LengthwiseError as error:
        result = str(error)
    print("RESULT", json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hugging_face.write(tmp_path_factory.mktemp("pushed") / "tiny", TINY)


@pytest.fixture
def hub(folder):
    hub = Hub()
    hub.push("org/tiny", folder)
    yield hub
    hub.close()


@pytest.fixture
def fetched(hub, tmp_path):
    """Fetches models one after the other in a new process; gives their receipts, or the lines that say why not."""

    def fetch(*models: str | dict, official: str = "http://127.0.0.1:9", **environment: str) -> list[dict | str]:
        calls = [{"folder": str(tmp_path / "weights"), **({"model": m} if isinstance(m, str) else m)} for m in models]
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "TORCH_HOME": str(tmp_path / "torch")}
        own |= {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
        command = [sys.executable, "-c", SCRIPT, json.dumps(calls), str(CHUNK_BYTES), official]
        done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
        found = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
        assert len(found) == len(calls), done.stderr
        return found

    return fetch


def assert_refused(line: dict | str, *words: str) -> None:
    assert isinstance(line, str), line
    assert "\n" not in line
    assert [word for word in words if word not in line] == [], line


def weights_sent(hub) -> list[tuple[int, int]]:
    return [(start, size) for name, start, size in hub.sent if name.endswith(".safetensors")]


def test_a_model_is_fetched_once_into_the_librarys_cache_and_found_offline(hub, fetched, folder, tmp_path):
    commit = hub.repositories["org/tiny"].references["main"]
    (receipt, again) = fetched("org/tiny", "org/tiny@main")
    path = Path(receipt["path"])
    assert path.is_relative_to(tmp_path / "hf" / "hub" / "models--org--tiny")
    content = (folder / "model.safetensors").read_bytes()
    assert (path / "model.safetensors").read_bytes() == content
    assert receipt["sha256"] == hashlib.sha256(content).hexdigest()
    assert receipt["bytes"] == len(content)
    assert receipt["hub"] == {"id": "org/tiny", "revision": "main", "commit": commit, "address": hub.url}
    assert (receipt["inv_freq"], receipt["random_weights"], receipt["attention_heads"]) == ("file", False, 2)
    assert len(weights_sent(hub)) == 1
    assert again == receipt | {"model": "org/tiny@main"}
    hub.close()
    whole, other = fetched("org/tiny", "org/other", HF_HUB_OFFLINE="1")
    assert whole == receipt
    assert_refused(other, "org/other", "HF_HUB_OFFLINE is set", "hf download")
    assert fetched("org/tiny") == [receipt]  # no answer
    (other,) = fetched("org/other")
    assert_refused(other, f"{hub.url} does not answer", "give a folder")


def test_each_revision_is_a_model_of_its_own(hub, fetched, tmp_path):
    sharded = hugging_face.write(tmp_path / "other", ModelConfig(2, 32, 4), shard_size="20kB")
    commit = hub.push("org/tiny", sharded, "refs/pr/1")
    of_main, of_branch, of_commit, nowhere = fetched(
        "org/tiny", "org/tiny@refs/pr/1", f"org/tiny@{commit}", "org/tiny@v9"
    )
    assert (of_main["attention_heads"], of_branch["attention_heads"]) == (2, 4)
    assert of_branch["hub"]["revision"] == "refs/pr/1"
    assert of_branch["hub"]["commit"] == of_commit["hub"]["commit"] == commit
    assert of_branch["sha256"] == of_commit["sha256"] != of_main["sha256"]
    assert_refused(nowhere, "org/tiny@v9", "no branch, tag or commit 'v9'")


def test_a_broken_transfer_goes_on_where_it_broke_and_one_given_up_begins_again(hub, fetched, folder, tmp_path):
    size = (folder / "model.safetensors").stat().st_size
    hub.breaks = 2
    assert isinstance(fetched("org/tiny")[0], dict)
    starts = [start for start, _ in weights_sent(hub)]
    assert len(starts) == 3
    assert starts == sorted(starts)
    assert starts[1] > size / 3

    hub.push("org/again", folder)
    hub.breaks = 1000
    assert_refused(fetched("org/again")[0], "org/again", "run again")
    assert not [*(tmp_path / "hf" / "hub" / "models--org--again").rglob("*.safetensors")]
    hub.breaks = 0
    assert isinstance(fetched("org/again")[0], dict)


def test_a_file_that_is_not_what_the_hub_announced_is_refused(hub, fetched):
    hub.repositories["org/tiny"].announced["model.safetensors"] = "0" * 64
    assert_refused(fetched("org/tiny")[0], "org/tiny", "announced 0000", "blobs/0000", "remove")


def test_a_pinned_checksum_is_held_against_the_file_and_no_tokenizer_is_needed(hub, fetched, tmp_path):
    folder = hugging_face.write(tmp_path / "tuned", TINY, EsmForSequenceClassification, vocabulary=False)
    hub.push("org/tiny", folder)
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    good, bad = fetched({"model": "org/tiny", "pinned_sha256": right}, {"model": "org/tiny", "pinned_sha256": "0" * 64})
    assert good["sha256"] == right
    assert_refused(bad, "model_sha256 in the config is 0000", "correct the config")


def test_a_gated_model_wants_terms_accepted_and_a_token(hub, fetched):
    hub.repositories["org/tiny"].gated = True
    gated, none = fetched("org/tiny", "org/none")
    assert_refused(gated, "org/tiny: is gated", f"{hub.url}/org/tiny", "hf auth login", "HF_TOKEN")
    assert_refused(none, "org/none", "knows no such model", "HF_TOKEN")
    assert isinstance(fetched("org/tiny", HF_TOKEN=Hub.token)[0], dict)


def pushed(hub, folder, name, change):
    """A model with changed files: {name: bytes}; None removes one."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | change
    hub.repositories.setdefault(name, type(hub.repositories["org/tiny"])()).push(
        {name: content for name, content in files.items() if content is not None}
    )
    return name


def test_what_cannot_be_read_is_refused_before_weights_are_fetched(hub, fetched, folder):
    config = json.loads((folder / "config.json").read_text())

    def with_config(**values):
        return {"config.json": json.dumps({**config, **values}).encode()}

    cases = {
        pushed(hub, folder, "org/pickle", {"model.safetensors": None, "pytorch_model.bin": b"x"}): [
            "has no safetensors", "pytorch_model.bin", "can run code", "from_pretrained('org/pickle').save_pretrained",
        ],
        pushed(hub, folder, "org/empty", {"model.safetensors": None}): ["neither model.safetensors nor"],
        pushed(hub, folder, "org/lora", {"config.json": None, "adapter_config.json": b"{}"}): ["merge_and_unload"],
        pushed(hub, folder, "EvolutionaryScale/esm3-sm-open-v1", {"config.json": None}): ["is ESM-3, which is not served"],
        pushed(hub, folder, "EvolutionaryScale/esmc-300m-2024-12", {"config.json": None}): ["is ESM-C"],
        pushed(hub, folder, "org/other", {"config.json": None}): ["has no config.json"],
        pushed(hub, folder, "org/esm1b", with_config(position_embedding_type="absolute", emb_layer_norm_before=True)): [
            "is ESM-1b, which is not served yet",
        ],
        pushed(hub, folder, "org/tokens", {"vocab.txt": "\n".join(get_default_vocab_list()[::-1]).encode()}): [
            "vocab.txt: token 0 is '<mask>'",
        ],
    }  # fmt: skip
    for line, words in zip(fetched(*cases), cases.values(), strict=True):
        assert_refused(line, *words)
    assert weights_sent(hub) == []


def test_the_six_come_from_the_hub_where_fair_esms_address_does_not_give_them(hub, fetched, folder):
    name = "esm2_t6_8M_UR50D"
    hub.push(f"facebook/{name}", folder)
    closed = "http://127.0.0.1:9"
    auto, own, other_url, of_hub = fetched(
        {"model": name, "url": closed},
        {"model": name, "url": closed, "source": "fair-esm"},
        {"model": name, "url": "http://127.0.0.1:10"},
        {"model": name, "source": "hub"},
        official=closed,
    )
    assert auto["hub"]["id"] == f"facebook/{name}"
    assert auto["model"] == name
    assert of_hub == auto
    assert_refused(own, f"{closed}/models/{name}.pt", "put it at")
    assert_refused(other_url, "127.0.0.1:10")  # somebody's own address is the only one
    hub.repositories.clear()
    neither = fetched({"model": "esm2_t12_35M_UR50D", "url": closed}, official=closed)[0]
    assert_refused(neither, f"{closed}/models/", "Nor does the hub give it: facebook/esm2_t12_35M_UR50D")
