"""Logits and contacts against fair-esm on the same weights."""

import numpy as np
import pytest
import torch

import checkpoints
from checkpoints import SHAPES
from fair_esm import assert_close, random_sequences
from lengthwise.esm2 import checkpoint, contacts, fair_esm_layout, outputs, tokens
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.model import Packing
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import MODELS
from lengthwise.esm2.streamed import StreamedEngine

CPU = torch.device("cpu")


@torch.inference_mode()
def fair_esm(path, sequences, dtype=torch.float32) -> list[dict[str, np.ndarray]]:
    """Of each sequence alone, tokenised by fair-esm: logits [L, 33], pseudo-perplexity, contacts [L, L]."""
    model, found = checkpoint.reference_model(path).to(dtype), []
    if regression := fair_esm_layout.read_contact_regression(path):
        model.load_state_dict(regression, strict=False)
    convert = model.alphabet.get_batch_converter()
    for sequence in sequences:
        _, _, given = convert([("", sequence.decode())])
        result = model(given, return_contacts=True)
        logits = result["logits"][0, 1:-1]
        there = logits.log_softmax(-1).gather(1, given[0, 1:-1, None])
        numbers = {"logits": logits, "pseudo_perplexity": (-there.mean()).exp(), "contacts": result["contacts"][0]}
        found.append({name: value.double().numpy() for name, value in numbers.items()})
    return found


def embed(path, sequences, asked, precision="float32", storage="float32", kind=Engine, layers=(1,), **contacts):
    engine = kind(path, CPU, precision, Output(layers, asked, storage, **contacts))
    (result,) = engine.embed([sequences])
    assert not result.status.any()
    return result.arrays


@pytest.fixture(params=SHAPES)
def any_head(request, tmp_path):
    checkpoint.write_random(tmp_path / "tiny.pt", SHAPES[request.param], seed=SHAPES[request.param].head_dim)
    checkpoint.write_random_regression(
        fair_esm_layout.contact_regression_path(tmp_path / "tiny.pt"), SHAPES[request.param]
    )
    return tmp_path / "tiny.pt"


@pytest.mark.parametrize("kind", [Engine, StreamedEngine])
def test_logits_of_every_head_size_are_fair_esms(any_head, kind):
    sequences = random_sequences([1, 2, 2, 37, 37, 150])
    theirs = fair_esm(any_head, sequences)
    ours = embed(any_head, sequences, ("logits",), kind=kind)
    assert_close(ours["logits"], np.concatenate([each["logits"] for each in theirs]))
    assert_close(ours["pseudo_perplexity"], np.stack([each["pseudo_perplexity"] for each in theirs]), 1e-4)
    assert set(ours) == {"logits", "pseudo_perplexity"}


@pytest.mark.parametrize("layers", [(0,), (1,), (3,), (1, 3)])
def test_logits_are_of_the_last_layer_whatever_layers_are_stored(any_head, layers):
    sequences = random_sequences([20])
    alone = embed(any_head, sequences, ("residue",), layers=layers)
    beside = embed(any_head, sequences, ("residue", "logits"), layers=layers)
    assert set(beside) == {*alone, "logits", "pseudo_perplexity"}
    for name, rows in alone.items():
        assert np.array_equal(rows, beside[name])
    assert_close(beside["logits"], fair_esm(any_head, sequences)[0]["logits"])


def test_logits_are_stored_in_the_type_of_rows_and_perplexities_in_float32(any_head):
    sequences = random_sequences([5, 40])
    wide = embed(any_head, sequences, ("logits",))
    narrow = embed(any_head, sequences, ("logits",), storage="float16")
    assert np.array_equal(narrow["logits"], wide["logits"].astype(np.float16))
    assert np.array_equal(narrow["pseudo_perplexity"], wide["pseudo_perplexity"])
    assert narrow["pseudo_perplexity"].dtype == np.float32


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["flat", "q,k x 6, others x 3, massive 3,000"])
def test_logits_in_half_precision_are_as_near_to_the_truth_as_fair_esms(tmp_path, precision, kind):
    """By the receipt's measure: over the residues, column by column."""
    from lengthwise.esm2.accuracy import Reference, judge

    checkpoints.write(tmp_path / "tiny.pt", SHAPES["150M"], kind)
    sequences = random_sequences([40, 80, 150])
    truth, theirs = (
        [np.pad(each["logits"], ((1, 1), (0, 0))) for each in fair_esm(tmp_path / "tiny.pt", sequences, dtype)]
        for dtype in (torch.float64, getattr(torch, precision))
    )
    reference = Reference.of(truth, theirs, 1.0)
    ours = embed(tmp_path / "tiny.pt", sequences, ("logits",), precision)["logits"]
    verdict = judge(ours, reference.right("logits"), reference, precision, "float32")
    assert verdict.share_of_limit <= 0.6


def test_a_checkpoint_without_the_head_is_refused_in_one_line(any_head, refused):
    data = torch.load(any_head, weights_only=False)
    data["model"] = {name: tensor for name, tensor in data["model"].items() if "lm_head" not in name}
    torch.save(data, any_head)
    embed(any_head, random_sequences([5]), ("residue",))
    with refused(str(any_head), "lm_head"):
        embed(any_head, random_sequences([5]), ("logits",))


def test_an_impossible_residue_gives_an_infinite_perplexity_and_keeps_its_rows(any_head):
    data = torch.load(any_head, weights_only=False)
    data["model"]["encoder.lm_head.bias"][tokens.tokenize(b"W")[1]] = -1e4
    torch.save(data, any_head)
    ours = embed(any_head, [b"W", b"MK"], ("residue", "logits"), storage="float16")
    assert np.isinf(ours["pseudo_perplexity"][0])
    assert np.isfinite(ours["pseudo_perplexity"][1])


def test_what_does_not_fit_has_nan_of_the_same_shapes(any_head):
    output = Output((0, 3), ("residue", "max", "logits", "contacts"), "float16", contacts_max_residues=3)
    width = checkpoint.read(any_head)[0].embed_dim
    computed = embed(
        any_head, [b"MKV"], output.outputs, storage="float16", layers=output.layers, contacts_max_residues=3
    )
    empty = output.of_nan(3, width)
    assert {name: (each.shape, each.dtype) for name, each in computed.items()} == {
        name: (tuple(each.shape), each.numpy().dtype) for name, each in empty.items()
    }
    assert all(each.isnan().all() for each in empty.values())


def triangles(theirs, max_residues=10_000) -> np.ndarray:
    """fair-esm's contacts, upper triangles end to end."""
    maps = [each["contacts"] for each in theirs if len(each["contacts"]) <= max_residues]
    return np.concatenate([each[np.triu_indices(len(each))] for each in maps])


@pytest.mark.parametrize(
    ("kind", "block_bytes"), [(Engine, 1), (Engine, 100_000), (Engine, 1 << 30), (StreamedEngine, 100_000)]
)
def test_contacts_of_every_head_size_are_fair_esms(any_head, kind, block_bytes, monkeypatch):
    """In blocks of one head, of several, and of several sequences."""
    original = contacts.ContactSums.__init__
    monkeypatch.setattr(
        contacts.ContactSums,
        "__init__",
        lambda self, head, packing, most, _: original(self, head, packing, most, block_bytes),
    )
    sequences = random_sequences([1, 2, 2, 37, 37, 37, 150, 40, 37])
    ours = embed(any_head, sequences, ("contacts",), kind=kind, contacts_max_residues=150, rounds_contacts=False)
    assert_close(ours["contacts"], triangles(fair_esm(any_head, sequences)))
    assert set(ours) == {"contacts"}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_contacts_where_attention_is_sharp(tmp_path, precision):
    """By the receipt's measure: over pairs, as one channel."""
    from lengthwise.esm2.accuracy import Reference, judge

    path = tmp_path / "tiny.pt"
    checkpoints.write(path, SHAPES["150M"], "q,k x 6, others x 3, massive 3,000")
    checkpoint.write_random_regression(fair_esm_layout.contact_regression_path(path), SHAPES["150M"])
    sequences = random_sequences([40, 80, 150])
    truth, theirs = (
        [np.pad(triangles([each]), 1)[:, None] for each in fair_esm(path, sequences, dtype)]
        for dtype in (torch.float64, getattr(torch, precision))
    )
    reference = Reference.of(truth, theirs, 1.0)
    ours = embed(path, sequences, ("contacts",), precision, contacts_max_residues=150, rounds_contacts=False)
    verdict = judge(ours["contacts"][:, None], reference.right("contacts"), reference, precision, "float32")
    assert verdict.share_of_limit <= 0.6


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2_t12_35M_UR50D"])
def test_logits_and_contacts_of_real_shapes_are_fair_esms(tmp_path, name):
    path = tmp_path / "real.pt"
    checkpoint.write_random(path, MODELS[name])
    checkpoint.write_random_regression(fair_esm_layout.contact_regression_path(path), MODELS[name])
    sequences = random_sequences([3, 60, 700])
    theirs = fair_esm(path, sequences)
    ours = embed(path, sequences, ("logits", "contacts"), contacts_max_residues=700, rounds_contacts=False)
    assert_close(ours["logits"], np.concatenate([each["logits"] for each in theirs]))
    # Most probabilities are near 0: the RMS is a tenth of the large ones, whose error is 2.9e-5 of it for 8M, 1.4e-6 in all.
    assert_close(ours["contacts"], triangles(theirs), 4e-5)


def test_long_sequences_have_no_contacts_and_the_others_theirs(any_head):
    sequences = random_sequences([30, 31, 32, 30])
    ours = embed(any_head, sequences, ("contacts", "residue"), contacts_max_residues=30, rounds_contacts=False)
    assert_close(ours["contacts"], triangles(fair_esm(any_head, sequences), 30))


def test_contacts_are_stored_in_float16(any_head):
    sequences = random_sequences([5, 40])
    exact, stored = (
        embed(any_head, sequences, ("contacts",), contacts_max_residues=99, rounds_contacts=rounds)["contacts"]
        for rounds in (False, True)
    )
    assert stored.dtype == np.float16
    assert np.array_equal(stored, exact.astype(np.float16))


def test_contacts_leave_other_outputs_alone(any_head):
    sequences = random_sequences([20, 50])
    alone = embed(any_head, sequences, ("residue", "logits"), layers=(1, 3))
    beside = embed(any_head, sequences, ("residue", "logits", "contacts"), layers=(1, 3), contacts_max_residues=20)
    for name, rows in alone.items():
        assert np.array_equal(rows, beside[name])


def test_numbers_that_are_not_finite_are_those_of_their_sequence():
    packing = Packing.of([5, 30, 4])
    triangle = torch.zeros(6 + 3)  # the second sequence is too long
    triangle[7] = torch.nan
    status = outputs.finite_status({"contacts": triangle}, packing, 20)
    assert status.tolist() == [0, 0, 1]
    outputs.fill_bad_with_nan({"contacts": triangle}, status, packing, 20)
    assert triangle.isnan().tolist() == [False] * 6 + [True] * 3


def test_a_checkpoint_without_contact_weights_is_refused_in_one_line(any_head, refused):
    fair_esm_layout.contact_regression_path(any_head).unlink()
    with refused(str(any_head), "contact_head"):
        embed(any_head, random_sequences([5]), ("contacts",), contacts_max_residues=5)


def test_heads_of_transformers_files_give_what_transformers_gives(tmp_path):
    from transformers import EsmConfig, EsmForMaskedLM

    options = {"position_embedding_type": "rotary", "token_dropout": True, "emb_layer_norm_before": False}
    torch.manual_seed(0)
    theirs = EsmForMaskedLM(
        EsmConfig(
            vocab_size=33,
            mask_token_id=32,
            pad_token_id=1,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            layer_norm_eps=1e-5,
            attn_implementation="eager",  # the others give no attention maps
            **options,
        )
    ).eval()
    with torch.no_grad():
        for weights in theirs.parameters():
            weights *= 3
        theirs.esm.contact_head.regression.weight *= 30
    theirs.save_pretrained(tmp_path)
    (sequence,) = random_sequences([60])
    given = torch.from_numpy(tokens.tokenize(sequence)).long()[None]
    ours = embed(tmp_path, [sequence], ("logits", "contacts"), contacts_max_residues=60, rounds_contacts=False)
    with torch.no_grad():
        assert_close(ours["logits"], theirs(given).logits[0, 1:-1].numpy())
        contacts_of = theirs.predict_contacts(given, torch.ones_like(given))[0].numpy()
    assert contacts_of.std() > 0.05
    assert_close(ours["contacts"], triangles([{"contacts": contacts_of}]))
