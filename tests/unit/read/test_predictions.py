"""Logits and contacts of a finished store, and what is computed from them: fair-esm's of each record."""

import pickle

import numpy as np
import pytest
import torch

import lengthwise
from lengthwise.esm2 import checkpoint, fair_esm_layout

# Float32 sums in another order, and the rounding of contacts to float16.
FLOAT32_TOLERANCE, FLOAT16_TOLERANCE = 2e-5, 2**-11
PROTEINS = {
    "long": "MKVLAWWCDEFGHIKLMNPQRSTVWY" * 3,
    "sp|P12345|ONE": "MKV",
    "gap": "MK-V",
    "twin": "MKVLAWWCDEFGHIKLMNPQRSTVWY" * 3,
    "one": "W",
    "lower": "acdefgxubzoj",
    "limit": "ACDEFGHIKL" * 3,
}
EMBEDDED = {name: sequence.upper().replace("J", "X") for name, sequence in PROTEINS.items() if name != "gap"}
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(scope="module")
def store(small_store, tiny_with_contact_head):
    made = small_store(
        tiny_with_contact_head, outputs=["logits", "contacts"], storage_dtype="float32", contacts_max_residues=30
    )
    made.ingest("a", PROTEINS)
    made.run(shard_bytes=1 << 16)
    return made


@pytest.fixture
def ds(store):
    return store.open("a")


@pytest.fixture(scope="module")
def theirs(tiny_with_contact_head):
    """{id: fair-esm's logits [L, 33] in float64 and contacts [L, L]}, and its columns"""
    model, found = checkpoint.reference_model(tiny_with_contact_head), {}
    model.load_state_dict(fair_esm_layout.read_contact_regression(tiny_with_contact_head), strict=False)
    convert = model.alphabet.get_batch_converter()
    with torch.inference_mode():
        for name, sequence in EMBEDDED.items():
            result = model(convert([(name, sequence)])[2], return_contacts=True)
            found[name] = result["logits"][0, 1:-1].double(), result["contacts"][0].numpy()
    return found, model.alphabet


def test_logits_are_a_frame_by_position_and_token(ds, theirs):
    found, alphabet = theirs
    assert list(ds.ids) == list(EMBEDDED)
    for name in ds.ids:
        frame = ds.logits(name)
        assert frame.columns.tolist() == alphabet.all_toks
        assert frame.index.tolist() == list(range(1, len(EMBEDDED[name]) + 1))
        np.testing.assert_allclose(frame.to_numpy(), found[name][0].numpy(), rtol=0, atol=FLOAT32_TOLERANCE * 2)
    assert ds.logits(1).equals(ds.logits("P12345"))  # by number, and by accession


def test_log_likelihoods_are_of_the_residues_that_are_there(ds, theirs):
    found, alphabet = theirs
    perplexity = ds.records.set_index("id")["pseudo_perplexity"]
    for name, sequence in EMBEDDED.items():
        likely = found[name][0].log_softmax(-1).numpy()
        expected = [likely[i, alphabet.get_idx(residue)] for i, residue in enumerate(sequence)]
        np.testing.assert_allclose(ds.log_likelihood(name), expected, rtol=0, atol=1e-4)
        assert np.exp(-ds.log_likelihood(name).mean()) == pytest.approx(perplexity[name], rel=1e-5)
    assert len(ds.where(f"pseudo_perplexity <= {perplexity['one'] + 1e-3}")) >= 1


def test_entropies_are_those_of_the_twenty_amino_acids(ds, theirs):
    found, alphabet = theirs
    columns = [alphabet.get_idx(residue) for residue in AMINO_ACIDS]
    for name in EMBEDDED:
        expected = torch.distributions.Categorical(logits=found[name][0][:, columns]).entropy().numpy()
        np.testing.assert_allclose(ds.entropy(name), expected, rtol=0, atol=1e-4)


def test_substitutions_are_log_odds_against_the_residue_that_is_there(ds, theirs):
    found, alphabet = theirs
    for name, sequence in EMBEDDED.items():
        frame, likely = ds.substitutions(name), found[name][0].log_softmax(-1).numpy()
        assert frame.columns.tolist() == list(AMINO_ACIDS)
        for position, residue in enumerate(sequence, start=1):
            for other in "AWY":
                expected = (
                    likely[position - 1, alphabet.get_idx(other)] - likely[position - 1, alphabet.get_idx(residue)]
                )
                assert frame.loc[position, other] == pytest.approx(expected, abs=1e-4)
            if residue in AMINO_ACIDS:
                assert frame.loc[position, residue] == 0


def test_contacts_are_whole_maps(ds, theirs):
    for name, sequence in EMBEDDED.items():
        if len(sequence) <= 30:
            found = ds.contacts(name)
            assert found.shape == (len(sequence), len(sequence))
            np.testing.assert_allclose(found, theirs[0][name][1], rtol=FLOAT16_TOLERANCE, atol=FLOAT32_TOLERANCE)
            assert np.array_equal(found, found.T)


def test_contacts_of_a_longer_protein_say_that_there_are_none(ds, refused):
    with refused("'long' has 78 residues", "at most 30", "contacts_max_residues"):
        ds.contacts("long")


def test_what_was_not_stored_is_refused(small_store, refused):
    made = small_store(outputs=["residue"])
    made.ingest("a", {"one": "MKV"})
    made.run()
    ds = made.open("a")
    for read in (ds.logits, ds.log_likelihood, ds.entropy, ds.substitutions):
        with refused("'logits' was not stored"):
            read("one")
    with refused("'contacts' was not stored"):
        ds.contacts("one")
    assert "pseudo_perplexity" not in ds.records


def test_an_unknown_id_is_refused_as_ever(ds):
    with pytest.raises(KeyError, match="was rejected"):
        ds.contacts("gap")
    with pytest.raises(IndexError):
        ds.logits(99)


def test_residues_that_were_not_stored_are_no_hindrance_to_predictions(ds, refused):
    with refused("residues are not among the stored outputs"):
        ds["one"]
    assert ds.logits("one").shape == (1, 33)


def test_selections_joined_datasets_and_copies_in_workers_read_the_same(ds):
    joined = lengthwise.concat([ds[["one"]], ds[["twin", "limit"]]])
    other = pickle.loads(pickle.dumps(ds[["limit"]]))
    for read in (
        lambda of: of.logits("limit").to_numpy(),
        lambda of: of.contacts("limit"),
        lambda of: of.entropy("limit"),
    ):
        assert np.array_equal(read(joined), read(ds))
        assert np.array_equal(read(other), read(ds))
    assert joined.records["pseudo_perplexity"].tolist() == [
        ds.records.set_index("id")["pseudo_perplexity"][name] for name in ("one", "twin", "limit")
    ]


def test_what_is_read_is_a_copy(ds):
    before = ds.logits("one")
    frame, contacts = ds.logits("one"), ds.contacts("one")
    frame.iloc[0, 0], contacts[0, 0] = 99, 99
    assert ds.logits("one").equals(before)
    assert ds.contacts("one")[0, 0] <= 1
