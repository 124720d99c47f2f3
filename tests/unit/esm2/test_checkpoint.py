"""Checkpoints: ours load into fair-esm's own model, and what is not one is refused without running a line of it."""

import argparse
import io
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import warnings
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from esm.pretrained import load_model_and_alphabet_core

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import MODELS, ModelConfig

TINY = ModelConfig(2, 32, 2)


def load_freely(path) -> dict:
    return torch.load(path, weights_only=False)


@pytest.fixture
def altered(tiny_checkpoint, tmp_path):
    """Saves the tiny checkpoint after a change of its dict, or what the change returns."""

    def make(change):
        data = load_freely(tiny_checkpoint)
        changed = change(data)
        torch.save(data if changed is None else changed, tmp_path / "altered.pt")
        return tmp_path / "altered.pt"

    return make


def test_a_random_checkpoint_loads_into_fair_esms_own_model(tiny_checkpoint):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        model, alphabet = load_model_and_alphabet_core("esm2_tiny", load_freely(tiny_checkpoint))
    assert (model.num_layers, model.embed_dim, model.attention_heads) == (2, 32, 2)
    assert len(alphabet) == TINY.vocabulary_size
    with torch.inference_mode():
        _, _, tokens = alphabet.get_batch_converter()([("", "MKVLAW")])
        assert model(tokens, repr_layers=[2])["representations"][2].isfinite().all()


def test_the_judge_holds_the_same_weights_as_fair_esms_own_loader(tiny_checkpoint):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Regression weights not found")
        theirs, _ = load_model_and_alphabet_core("esm2_tiny", load_freely(tiny_checkpoint))
    ours = checkpoint.reference_model(tiny_checkpoint).state_dict()
    for name, tensor in theirs.state_dict().items():
        if not name.startswith("contact_head"):
            assert torch.equal(ours[name], tensor), name


def test_read_gives_the_shape_the_tensors_and_that_they_are_random(tiny_checkpoint):
    config, state, is_random, _ = checkpoint.read(tiny_checkpoint)
    assert (config, is_random) == (TINY, True)
    stored = load_freely(tiny_checkpoint)["model"]
    assert len(state) == len(stored)
    for name, tensor in stored.items():
        assert torch.equal(state[name.replace("encoder.sentence_encoder.", "").replace("encoder.", "")], tensor)


def test_a_checkpoint_that_we_did_not_make_is_not_random(altered):
    assert (
        checkpoint.read(altered(lambda data: delattr(data["cfg"]["model"], "lengthwise_random_seed"))).random is False
    )


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path, tiny_checkpoint):
    for seed in (0, 1):
        checkpoint.write_random(tmp_path / f"of_seed_{seed}.pt", TINY, seed=seed)
    assert (tmp_path / "of_seed_0.pt").read_bytes() == tiny_checkpoint.read_bytes()
    assert (tmp_path / "of_seed_1.pt").read_bytes() != tiny_checkpoint.read_bytes()


def test_the_weights_do_not_hang_on_the_global_random_state(tmp_path, tiny_checkpoint):
    torch.manual_seed(1234)
    checkpoint.write_random(tmp_path / "again.pt", TINY)
    assert (tmp_path / "again.pt").read_bytes() == tiny_checkpoint.read_bytes()


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda evil, data, path: torch.save(evil, path), id="alone"),
        pytest.param(lambda evil, data, path: torch.save({**data, "more": evil}, path), id="beside-the-model"),
        pytest.param(
            lambda evil, data, path: torch.save(
                {**data, "cfg": {"model": argparse.Namespace(encoder_layers=evil)}}, path
            ),
            id="in-the-config",
        ),
        pytest.param(lambda evil, data, path: path.write_bytes(pickle.dumps(evil)), id="plain-pickle"),
        pytest.param(
            lambda evil, data, path: torch.save(evil, path, _use_new_zipfile_serialization=False), id="old-torch-file"
        ),
    ],
)
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, tiny_checkpoint, refused, write):
    path, touched = tmp_path / "evil.pt", tmp_path / "touched"
    write(Payload(touched), load_freely(tiny_checkpoint), path)
    with refused("evil.pt"):
        checkpoint.read(path)
    assert not touched.exists()


def test_the_payload_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


def test_an_object_of_any_other_class_is_refused(altered, refused):
    with refused("altered.pt", "refused"):
        checkpoint.read(altered(lambda data: {**data, "more": pathlib.PurePosixPath("x")}))


def zip_of(pickled: bytes, name: str = "x/data.pkl") -> bytes:
    """A torch file with this pickle in it and no tensors."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, pickled)
        archive.writestr("x/version", b"3\n")
    return buffer.getvalue()


def torch_file(value) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def is_without_torchs_advice(line: str) -> bool:
    return not {"weights_only", "add_safe_globals", "torch.load", "mmap"} & set(re.findall(r"[\w.]+", line))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch_file(np.zeros(3)), "holds numpy"),
        (torch_file(pathlib.PurePosixPath("x")), "holds pathlib.PurePosixPath, whose code would run"),
        (zip_of(b"\x80\x02cos\nsystem\n."), "holds os.system, whose code would run"),
        (zip_of(b"\x80\x02X\xff"), "torch cannot read its content"),
        (pickle.dumps({"model": pathlib.PurePosixPath("x")}), "not the archive that torch.save writes"),
        (b"\x1b[31mgarbage", "not the archive that torch.save writes"),
        (b"", "not the archive that torch.save writes"),
    ],
    ids=["array", "class", "code", "broken", "plain-pickle", "garbage", "empty"],
)
def test_a_refusal_is_in_our_words_and_not_torchs_advice_to_run_code(tmp_path, refused, content, words):
    (tmp_path / "other.pt").write_bytes(content)
    with refused("other.pt: ", words) as caught:
        checkpoint.read(tmp_path / "other.pt")
    assert is_without_torchs_advice(str(caught.value))


def test_the_advice_that_these_tests_look_for_is_torchs(tmp_path):
    (tmp_path / "other.pt").write_bytes(torch_file(pathlib.PurePosixPath("x")))
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(tmp_path / "other.pt", weights_only=True)
    assert not is_without_torchs_advice(str(caught.value))


def test_numbers_of_layers_that_are_none_are_no_checkpoint(altered, refused):
    def with_layers(number):
        return lambda data: {**data, "cfg": {"model": argparse.Namespace(**{**vars(data["cfg"]["model"]), **number})}}

    for number in ({"encoder_layers": "2"}, {"encoder_attention_heads": 0}, {"encoder_embed_dim": None}):
        with refused("altered.pt", "no ESM-2 checkpoint"):
            checkpoint.read(altered(with_layers(number)))


def test_the_list_of_allowed_classes_is_as_before(tiny_checkpoint):
    before = set(torch.serialization.get_safe_globals())
    checkpoint.read(tiny_checkpoint)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"\x00" * 1000, id="zeros"),
        pytest.param(lambda data: random.Random(0).randbytes(1000), id="noise"),
        pytest.param(lambda data: b"not a checkpoint\n", id="text"),
        pytest.param(lambda data: b"<!DOCTYPE html><title>404</title>", id="web-page"),
        pytest.param(lambda data: data[:100], id="first-bytes"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-1], id="a-byte-short"),
        pytest.param(lambda data: data[1:], id="first-byte-gone"),
        pytest.param(lambda data: zip_of(b"", name="a.txt"), id="zip-of-text"),
        pytest.param(lambda data: zip_of(b""), id="empty-pickle"),
        pytest.param(lambda data: zip_of(b"\x80\x02."), id="pickle-of-nothing"),
        pytest.param(lambda data: zip_of(b"\x80\x02X\xff"), id="broken-pickle"),
        pytest.param(lambda data: zip_of(b"\x80\x02h\x09."), id="pickle-of-no-memo"),
        pytest.param(lambda data: pickle.dumps({"model": {}}), id="plain-pickle"),
    ],
)
def test_what_is_no_torch_file_is_one_line(tmp_path, tiny_checkpoint, refused, spoil):
    path = tmp_path / "other.pt"
    path.write_bytes(spoil(tiny_checkpoint.read_bytes()))
    with refused("other.pt"):
        checkpoint.read(path)


@pytest.mark.parametrize("make", ["mkdir", "exists"])
def test_what_is_no_file_is_one_line(tmp_path, refused, make):
    getattr(tmp_path / "none.pt", make)()
    with refused("none.pt", "no such checkpoint"):
        checkpoint.read(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda data: {"args": data["cfg"]["model"], "model": data["model"]}, id="ESM-1"),
        pytest.param(lambda data: {f"esm.{name}": tensor for name, tensor in data["model"].items()}, id="Hugging-Face"),
        pytest.param(lambda data: {"state_dict": data["model"], "epoch": 1}, id="lightning"),
        pytest.param(
            lambda data: {"cfg": {"model": {"encoder_layers": 2}}, "model": data["model"]}, id="config-as-dict"
        ),
        pytest.param(lambda data: {"cfg": {"model": argparse.Namespace()}, "model": data["model"]}, id="empty-config"),
        pytest.param(lambda data: {**data, "model": None}, id="no-state"),
        pytest.param(lambda data: {**data, "cfg": None}, id="no-config"),
        pytest.param(lambda data: [data], id="list"),
        pytest.param(lambda data: "text", id="text"),
        pytest.param(
            lambda data: data["model"]["encoder.lm_head.bias"],
            id="tensor",
        ),
    ],
)
def test_a_torch_file_of_another_layout_is_one_line(altered, refused, content):
    with refused("altered.pt", "no ESM-2 checkpoint"):
        checkpoint.read(altered(content))


def test_every_tensor_that_the_forward_pass_needs_is_named_when_it_is_missing(altered, refused, tiny_checkpoint):
    stored = load_freely(tiny_checkpoint)["model"]
    for name in [name for name in stored if "lm_head" not in name]:  # the head embeds nothing

        def drop(data, name=name):
            del data["model"][name]

        with refused("altered.pt", "lacks 1 tensors", name.removeprefix("encoder.sentence_encoder.")):
            checkpoint.read(altered(drop))


def set_tensor(name: str, tensor):
    def change(data: dict) -> None:
        data["model"][f"encoder.sentence_encoder.{name}"] = tensor

    return change


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embed_tokens.weight", (33, 64)),
        ("embed_tokens.weight", (20, 32)),
        ("layers.0.fc1.weight", (64, 32)),
        ("layers.1.self_attn.q_proj.bias", (64,)),
        ("layers.0.self_attn.rot_emb.inv_freq", (16,)),
    ],
    ids=str,
)
def test_a_tensor_of_the_wrong_shape_is_named_when_the_checkpoint_is_read(altered, refused, name, shape):
    with refused("altered.pt", name):
        checkpoint.read(altered(set_tensor(name, torch.zeros(shape))))


def test_fewer_layers_than_the_file_has_are_refused(altered, refused):
    with refused("altered.pt", "encoder_layers is 1, but the weights have 2 layers"):
        checkpoint.read(altered(lambda data: setattr(data["cfg"]["model"], "encoder_layers", 1)))


def test_another_feed_forward_width_is_not_served(altered, refused):
    def narrow(data):
        for index in range(2):
            for name, shape in (("fc1.weight", (64, 32)), ("fc1.bias", (64,)), ("fc2.weight", (32, 64))):
                set_tensor(f"layers.{index}.{name}", torch.zeros(shape))(data)

    with refused("altered.pt", "intermediate_size is 64; another one than 4 x hidden_size (128) is not served yet"):
        checkpoint.read(altered(narrow))


def test_layers_with_different_rotary_frequencies_are_one_line(altered, refused):
    path = altered(set_tensor("layers.1.self_attn.rot_emb.inv_freq", torch.ones(8)))
    with refused("altered.pt", "rotary frequencies"):
        checkpoint.load_model(path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rotary_frequencies_stay_in_float32_as_they_were_stored(tiny_checkpoint, dtype):
    model = checkpoint.load_model(tiny_checkpoint, torch.device("cpu"), dtype)
    stored = load_freely(tiny_checkpoint)["model"]["encoder.sentence_encoder.layers.0.self_attn.rot_emb.inv_freq"]
    assert model.inv_freq.dtype == torch.float32
    assert torch.equal(model.inv_freq, stored)
    # The products in the compute type, what is added up in float32.
    types = {(name.split(".")[-2], parameter.dtype) for name, parameter in model.named_parameters()}
    norms = {"embed_tokens", "self_attn_layer_norm", "final_layer_norm", "emb_layer_norm_after"}
    assert types == {(name, dtype) for name in ("qkv", "out_proj", "fc1", "fc2")} | {(n, torch.float32) for n in norms}


def test_a_model_is_loaded_whole_and_for_inference(tiny_checkpoint):
    model = checkpoint.load_model(tiny_checkpoint, torch.device("cpu"), torch.float32)
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert len(model.layers) == TINY.num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_one_by_one_are_those_of_the_model_and_leave_nothing_mapped(tmp_path, tiny_checkpoint, dtype):
    path = tmp_path / "own_name.pt"
    path.write_bytes(tiny_checkpoint.read_bytes())
    cpu, rows = torch.device("cpu"), torch.randn(7, TINY.embed_dim)
    whole, ends = checkpoint.load_model(path, cpu, dtype), checkpoint.load_ends(path, cpu)
    loaded = {name for name, tensor in ends.state_dict().items() if not tensor.is_meta}
    assert loaded == {name for name in whole.state_dict() if not name.startswith("layers.")}
    for index, layer in enumerate(whole.layers):
        alone = checkpoint.load_layer(path, index, cpu, dtype)
        assert "own_name" not in pathlib.Path("/proc/self/maps").read_text()
        assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in alone.state_dict().items())
        for part in ("qkv", "out_proj", "fc1"):
            assert torch.equal(getattr(alone, part)(rows), getattr(layer, part)(rows))


@pytest.mark.parametrize("place", range(0, 600, 23))
def test_a_flipped_byte_in_the_pickle_is_refused_or_harmless(tmp_path, tiny_checkpoint, place):
    data = bytearray(tiny_checkpoint.read_bytes())
    with zipfile.ZipFile(tiny_checkpoint) as archive:
        (info,) = (info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    start = data.index(b"\x80\x02", info.header_offset)
    data[start + place] ^= 0xFF
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    # Refused in the package's own words, or read as before: any other exception fails the test.
    with suppress(LengthwiseError):
        config, state, *_ = checkpoint.read(path)
        assert config == TINY
        assert state.keys() == checkpoint.read(tiny_checkpoint)[1].keys()


def test_a_loaded_model_does_not_change_with_its_file(tmp_path, tiny_checkpoint):
    """A memory-mapped file that is overwritten in place would change the weights in the middle of a run."""
    path = tmp_path / "copy.pt"
    path.write_bytes(tiny_checkpoint.read_bytes())
    model = checkpoint.load_model(path, torch.device("cpu"), torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 1.35), ("bfloat16", 0.85)])
def test_a_model_loads_in_less_memory_than_two_copies_of_its_checkpoint(tmp_path, dtype, copies):
    """Memory of its own, that is: the checkpoint's mapped pages are the system's to drop."""
    path = tmp_path / "35M.pt"
    checkpoint.write_random(path, MODELS["esm2_t12_35M_UR50D"])
    code = f"""
import threading, torch
from pathlib import Path
from lengthwise.esm2 import checkpoint

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

torch.set_num_threads(1)
checkpoint.load_model(Path({str(tmp_path / "tiny.pt")!r}), torch.device("cpu"), torch.{dtype})
seen, done = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = checkpoint.load_model(Path({str(path)!r}), torch.device("cpu"), torch.{dtype})
done.set()
thread.join()
print(max(seen) - seen[0])
"""
    checkpoint.write_random(tmp_path / "tiny.pt", TINY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < copies * path.stat().st_size
