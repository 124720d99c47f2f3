"""Checkpoints in transformers' layout: judged by transformers, and by fair-esm with the same weights."""

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from esm.data import Alphabet
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification, EsmModel
from transformers.models.esm.configuration_esm import get_default_vocab_list

import hugging_face
from checkpoints import SHAPES
from fair_esm import assert_right, references
from lengthwise.esm2 import checkpoint, sources, tokens
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.heads import head_facts
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.reference import reference_rows
from lengthwise.esm2.shapes import MODELS, ModelConfig
from lengthwise.esm2.streamed import StreamedEngine

CPU = torch.device("cpu")
# Float32 sums in another order, of the RMS of a layer's rows.
TOLERANCE = 2e-5
TINY = ModelConfig(2, 32, 2)


def random_sequence(length, seed=0) -> bytes:
    return bytes(random.Random(seed).choices(tokens.RESIDUES, k=length))


def embed(path, sequence, layers, engine=Engine, precision="float32") -> dict[int, np.ndarray]:
    made = engine(path, CPU, precision, Output(tuple(layers), ("residue",), "float32"))
    (result,) = made.embed([[sequence]])
    return {layer: result.arrays[f"layer_{layer}"] for layer in layers}


def assert_equals_both_judges(path: Path, sequence: bytes, layers) -> None:
    ours = embed(path, sequence, layers)
    of_transformers = hugging_face.rows(path, sequence, layers)
    of_fair_esm = reference_rows(path, CPU, torch.float32, [sequence], layers)
    for layer in layers:
        for theirs in (of_transformers[layer][1:-1], of_fair_esm[layer][0][1:-1]):
            rms = np.sqrt(np.mean(np.square(theirs, dtype=np.float64)))
            assert np.abs(ours[layer] - theirs).max() <= TOLERANCE * max(1.0, rms), layer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny EsmForMaskedLM, to be read."""
    return hugging_face.write(tmp_path_factory.mktemp("hub") / "tiny", TINY)


@pytest.fixture
def folder(saved, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def set_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("name", SHAPES)
def test_every_head_size_equals_transformers_and_fair_esm(tmp_path, name):
    path = hugging_face.write(tmp_path / "model", SHAPES[name])
    for length in (1, 40, 300):
        assert_equals_both_judges(path, random_sequence(length), [0, 1, 3])


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_sharp_attention_is_right_by_the_receipts_measure(tmp_path, precision):
    path = hugging_face.write(tmp_path / "model", SHAPES["150M"], sharpness=4)
    sequence = random_sequence(150)
    theirs = references(path, [sequence], [1, 3], [precision])[precision]
    ours = embed(path, sequence, [1, 3], precision=precision)
    assert_right({f"layer_{layer}": rows for layer, rows in ours.items()}, theirs, precision)


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D"])
def test_the_shapes_of_8m_and_35m_equal_transformers_and_fair_esm(tmp_path, name):
    shape = MODELS[name]
    path = hugging_face.write(tmp_path / name, shape, EsmModel)
    for length in (30, 700):
        assert_equals_both_judges(path, random_sequence(length), [0, shape.num_layers])


@pytest.mark.parametrize("kind", [EsmModel, EsmForSequenceClassification, EsmForTokenClassification])
def test_models_of_any_kind_with_an_encoder_are_read(tmp_path, kind):
    assert_equals_both_judges(hugging_face.write(tmp_path / "model", TINY, kind), random_sequence(50), [0, 2])


def test_transformers_4_wrote_other_names(folder):
    ours = embed(folder, random_sequence(50), [2])[2]
    hugging_face.change(folder, hugging_face.as_transformers_4)
    names = load_file(folder / "model.safetensors")
    assert "esm.encoder.layer.1.attention.self.rotary_embeddings.inv_freq" in names
    assert not [name for name in names if "gamma" in name or "*" in name]
    assert np.array_equal(embed(folder, random_sequence(50), [2])[2], ours)


def test_several_files_are_one_model_streamed_or_not(tmp_path, saved):
    path = hugging_face.write(tmp_path / "sharded", TINY, shard_size="20kB")
    assert len([*path.glob("*.safetensors")]) > 3
    sequence = random_sequence(80)
    whole = embed(saved, sequence, [0, 1, 2])
    for engine in (Engine, StreamedEngine):
        ours = embed(path, sequence, [0, 1, 2], engine)
        assert all(np.array_equal(ours[layer], whole[layer]) for layer in whole)


def test_a_file_is_read_with_the_config_beside_it(saved):
    sequence = random_sequence(30)
    assert np.array_equal(embed(saved / "model.safetensors", sequence, [2])[2], embed(saved, sequence, [2])[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_what_they_hold(tmp_path, dtype):
    path = hugging_face.write(tmp_path / "half", TINY, dtype=dtype)
    assert checkpoint.read(path).state["layers.0.fc1.weight"].dtype is dtype
    assert_equals_both_judges(path, random_sequence(200), [0, 2])


def test_frequencies_are_the_files_own_and_else_computed(tmp_path, folder):
    own = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003])

    def give(tensors):
        tensors |= {name: own.clone() for name in tensors if name.endswith("inv_freq")}

    hugging_face.change(folder, give)
    opened = checkpoint.read(folder)
    assert opened.has_frequencies
    assert torch.equal(checkpoint.load_ends(folder, CPU).inv_freq, own)
    assert_equals_both_judges(folder, random_sequence(200), [2])

    hugging_face.change(folder, hugging_face.without_frequencies)
    assert not checkpoint.read(folder).has_frequencies
    buffers = dict(EsmModel(hugging_face.config_of(TINY)).named_buffers())
    computed = next(buffer for name, buffer in buffers.items() if name.endswith("inv_freq"))
    assert torch.equal(checkpoint.load_ends(folder, CPU).inv_freq, computed)
    assert_equals_both_judges(folder, random_sequence(200), [2])


def test_a_padded_vocabulary_is_cut(tmp_path):
    path = hugging_face.write(tmp_path / "padded", TINY, vocab_size=40)
    assert len(checkpoint.load_ends(path, CPU).embed_tokens.weight) == 33
    assert {len(weights) for weights in checkpoint.load_head(path, "lm_head", CPU).values()} == {32, 33}
    ours = embed(path, random_sequence(50), [2])[2]
    theirs = hugging_face.rows(path, random_sequence(50), [2])[2][1:-1]
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.sqrt(np.mean(np.square(theirs))))


def test_the_vocabulary_is_fair_esms_and_transformers():
    assert list(tokens.VOCABULARY) == Alphabet.from_architecture("ESM-1b").all_toks == list(get_default_vocab_list())


@torch.inference_mode()
def test_heads_are_those_of_transformers(saved):
    model = EsmForMaskedLM.from_pretrained(saved).lm_head
    lm_head = checkpoint.load_head(saved, "lm_head", CPU)
    x = torch.randn(5, TINY.embed_dim)
    hidden = torch.nn.functional.gelu(x @ lm_head["dense.weight"].T + lm_head["dense.bias"])
    hidden = torch.nn.functional.layer_norm(
        hidden, (TINY.embed_dim,), lm_head["layer_norm.weight"], lm_head["layer_norm.bias"], 1e-5
    )
    assert torch.allclose(hidden @ lm_head["weight"].T + lm_head["bias"], model(x), atol=1e-5)
    contact_head = checkpoint.load_head(saved, "contact_head", CPU)
    assert contact_head["regression.weight"].shape == (1, TINY.num_layers * TINY.attention_heads)


def test_an_own_decoder_is_the_heads_and_not_the_embedding(folder):
    own = torch.randn(33, TINY.embed_dim)
    hugging_face.change(folder, lambda tensors: tensors.update({"lm_head.decoder.weight": own}))
    assert torch.equal(checkpoint.load_head(folder, "lm_head", CPU)["weight"], own)


def test_a_head_that_is_not_there_is_refused(tmp_path, tiny_checkpoint, refused):
    path = hugging_face.write(tmp_path / "model", TINY, EsmModel)
    with refused("lacks 6 tensors", "lm_head.bias"):
        checkpoint.load_head(path, "lm_head", CPU)
    with refused("lacks 2 tensors", "contact_head.regression.bias"):
        checkpoint.load_head(tiny_checkpoint, "contact_head", CPU)


def test_the_contact_head_of_a_pt_is_in_the_file_beside_it(tmp_path, tiny_checkpoint):
    shutil.copy(tiny_checkpoint, tmp_path / "tiny.pt")
    weights = {"contact_head.regression.weight": torch.randn(1, 4), "contact_head.regression.bias": torch.randn(1)}
    torch.save({"model": weights}, tmp_path / "tiny-contact-regression.pt")
    found = checkpoint.load_head(tmp_path / "tiny.pt", "contact_head", CPU)
    assert torch.equal(found["regression.weight"], weights["contact_head.regression.weight"])


OTHERS = {
    "esm1b": (
        {"position_embedding_type": "absolute", "emb_layer_norm_before": True},
        "ESM-1b, which is not served yet",
    ),
    "esm1v": ({"position_embedding_type": "absolute"}, "ESM-1v"),
    "no-position-type": ({"position_embedding_type": None}, "ESM-1v"),
    "esmc": ({"model_type": "esmc"}, "ESM-C, which is not served yet"),
    "esm3": ({"model_type": "esm3"}, "ESM-3, which is not served yet"),
    "bert": ({"model_type": "bert"}, "a model of type 'bert', which is not served yet"),
    "no-type": ({"model_type": None}, "no model_type"),
    "norm-before": ({"emb_layer_norm_before": True}, "emb_layer_norm_before is True; ESM-2 has False"),
    "no-token-dropout": ({"token_dropout": False}, "token_dropout is False"),
    "epsilon": ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12; ESM-2 has 1e-05"),
    "rope": ({"rope_theta": 500_000.0}, "rope_theta is 500000.0"),
    "decoder": ({"is_decoder": True}, "is_decoder is True"),
    "mask-token": ({"mask_token_id": 4}, "mask_token_id is 4"),
    "small-vocabulary": ({"vocab_size": 29}, "vocab_size is 29"),
    "vocabulary": ({"vocab_list": [*reversed(get_default_vocab_list())]}, "token 0 is '<mask>'"),
    "sizes": ({"hidden_size": "32"}, "hidden_size is '32', which is no size"),
    "heads": ({"num_attention_heads": 3}, "does not fit 3 rotary heads"),
    "more-layers": ({"num_hidden_layers": 3}, "tensors, esm.encoder.layer.2.LayerNorm.bias the first of them"),
    "fewer-layers": ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the weights have 2 layers"),
    "feed-forward": (
        {"intermediate_size": 64},
        "intermediate_size is 64; another one than 4 x hidden_size (128) is not served yet",
    ),
    "width": (
        {"hidden_size": 64, "intermediate_size": 256},
        "esm.embeddings.word_embeddings.weight is (33, 32) and should be (33, 64)",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_model_that_is_not_esm2_is_refused_in_one_line(folder, refused, case):
    values, words = OTHERS[case]
    set_config(folder, **values)
    with refused(str(folder), words):
        checkpoint.read(folder)


@pytest.mark.parametrize("config_says", [64, None])
def test_another_feed_forward_width_is_not_served_and_not_called_damage(tmp_path, refused, config_says):
    path = hugging_face.write(tmp_path / "narrow", TINY, intermediate_size=64)
    set_config(path, intermediate_size=config_says)
    with refused(str(path), "intermediate_size is 64; another one than 4 x hidden_size (128) is not served yet"):
        checkpoint.read(path)


def test_another_order_of_tokens_is_refused(folder, refused):
    vocabulary = [*get_default_vocab_list()]
    vocabulary[4:6] = "AL"
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    with refused("vocab.txt", "token 4 is 'A'; it is 'L' in ESM-2's vocabulary"):
        checkpoint.read(folder)


def drop(ending):
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(ending)))


DAMAGED = {
    "missing": (drop("layer.1.output.dense.bias"), "lacks 1 tensors, esm.encoder.layer.1.output.dense.bias"),
    "no-embedding": (drop("word_embeddings.weight"), "holds 0 tensors embeddings.word_embeddings.weight"),
    "shape": (
        lambda tensors: tensors.update({"esm.encoder.layer.0.intermediate.dense.bias": torch.zeros(64)}),
        "esm.encoder.layer.0.intermediate.dense.bias is (64,) and should be (128,)",
    ),
    "quantised": (
        lambda tensors: tensors.update(
            {"esm.encoder.layer.0.intermediate.dense.weight": torch.zeros(128, 32, dtype=torch.int8)}
        ),
        "torch.int8; quantised weights are not served",
    ),
    "adapters": (
        lambda tensors: (
            [tensors.pop(name) for name in [*tensors]] and tensors.update({"x.lora_A.weight": torch.ones(1)})
        ),
        "adapters",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_wrong_tensors_are_refused_in_one_line(folder, refused, case):
    how, words = DAMAGED[case]
    with refused(str(folder), words):
        checkpoint.read(hugging_face.change(folder, how))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["esm.encoder.layer.1.output.dense.weight", "esm.embeddings.word_embeddings.weight"])
def test_values_that_are_not_finite_are_refused(folder, refused, name, value):
    checkpoint.require_finite(folder)
    hugging_face.change(folder, lambda tensors: tensors[name][3].fill_(value))
    with refused(str(folder), "NaN or infinite"):
        checkpoint.require_finite(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "output", "ours"),
    [
        ("lm_head.dense.weight", "logits", "lm_head.dense.weight"),
        ("esm.contact_head.regression.bias", "contacts", "contact_head.regression.bias"),
    ],
)
def test_a_head_that_is_not_finite_is_refused_where_it_is_needed(folder, refused, name, output, ours, value):
    hugging_face.change(folder, lambda tensors: tensors[name][0].fill_(value))
    with refused(str(folder), f"the tensor {ours} has values that are NaN or infinite; the file is damaged"):
        head_facts(folder, [output])
    head_facts(folder, {"logits", "contacts"} - {output})


def test_damaged_files_are_refused_in_one_line(folder, refused):
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[:-10], whole[:100], b"", b"\x80\x04" + whole, b"<!doctype html>" + whole):
        (folder / "model.safetensors").write_bytes(content)
        with refused("model.safetensors", "damaged, or no safetensors file"):
            checkpoint.read(folder)


def test_a_pickle_is_refused_with_the_way_out(folder, refused):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with refused("pytorch_model.bin", "can run code", "save_pretrained"):
        sources.require_checkpoint(str(folder))
    with refused("can run code", "save_pretrained"):
        sources.require_checkpoint(str(folder / "pytorch_model.bin"))


@pytest.mark.parametrize("name", ["config.json", "vocab.txt"])
def test_a_file_beside_the_weights_is_refused_with_the_folder_to_give(folder, refused, name, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for given in (folder / name, Path(folder.name, name)):  # the second is like an id of the hub
        with refused(f"{given}: ", f"give the folder {given.parent}"):
            sources.require_model(str(given))
    monkeypatch.chdir(folder)
    with refused(f"{name}: ", "give the folder ."):
        sources.require_model(name)


def test_a_file_of_another_kind_is_no_model(tmp_path, refused):
    (tmp_path / "a.fasta").write_text(">a\nMK\n")
    with refused("a.fasta", "no weights; give a fair-esm .pt file, a safetensors file or the folder"):
        sources.require_model(str(tmp_path / "a.fasta"))


def test_adapters_without_a_model_are_refused_with_the_way_out(folder, refused):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with refused("adapters", "merge_and_unload"):
        sources.require_checkpoint(str(folder))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": "x.bin"}}',
    ],
)
def test_a_damaged_index_is_refused(folder, refused, index):
    (folder / "model.safetensors.index.json").write_text(index)
    with refused("model.safetensors.index.json", "no index"):
        checkpoint.read(folder)


def test_a_missing_file_of_several_is_named(tmp_path, refused):
    path = hugging_face.write(tmp_path / "sharded", TINY, shard_size="20kB")
    second = sorted(path.glob("*.safetensors"))[1]
    second.unlink()
    with refused(second.name, "is missing"):
        checkpoint.read(path)


def test_a_missing_config_is_named(folder, refused):
    (folder / "config.json").unlink()
    with refused("config.json", "is missing"):
        checkpoint.read(folder / "model.safetensors")


def test_the_identity_is_the_files_checksum_or_that_of_their_listing(tmp_path, saved):
    whole = sources.identity(sources.file_sha256(saved))
    assert whole == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    path = hugging_face.write(tmp_path / "sharded", TINY, shard_size="20kB")
    shell = subprocess.run(
        "sha256sum model-*.safetensors | sha256sum", shell=True, cwd=path, capture_output=True, text=True, check=True
    )
    first = sources.identity(sources.file_sha256(path))
    assert first == shell.stdout.split()[0]
    file = sorted(path.glob("*.safetensors"))[1]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert sources.identity(sources.file_sha256(path)) != first


@torch.inference_mode()
def test_logits_and_contacts_equal_transformers(saved):
    """Of a sequence alone; tests of the heads compare with fair-esm."""
    sequence = random_sequence(60)
    output = Output((2,), ("logits", "contacts"), "float32", contacts_max_residues=60, rounds_contacts=False)
    engine = Engine(saved, CPU, "float32", output)
    (result,) = engine.embed([[sequence]])
    model, inputs = EsmForMaskedLM.from_pretrained(saved, attn_implementation="eager"), hugging_face.inputs(sequence)
    logits = model(**inputs).logits[0, 1:-1].numpy()
    assert np.abs(result.arrays["logits"] - logits).max() <= TOLERANCE * np.sqrt(np.mean(np.square(logits)))
    contacts = model.predict_contacts(inputs["input_ids"], inputs["attention_mask"])[0].numpy()
    assert np.ptp(contacts) > 1000 * TOLERANCE
    assert np.abs(result.arrays["contacts"] - contacts[np.triu_indices(60)]).max() <= TOLERANCE
