"""Maximum and standard deviation: stored, or computed from stored rows, they are fair-esm's."""

import numpy as np
import pytest
import torch

from lengthwise.esm2 import checkpoint, outputs
from lengthwise.esm2.model import Packing

# Float32 sums in another order, relative to the RMS: see test_model.
FLOAT32_TOLERANCE = 2e-5
PROTEINS = {
    "long": "MKVLAWWCDEFGHIKLMNPQRSTVWY" * 3,
    "short": "MKV",
    "twin": "MKVLAWWCDEFGHIKLMNPQRSTVWY" * 3,
    "one": "W",
    "rare": "ACDEFGXUBZOKL",
}


@pytest.fixture(scope="module")
def stores(small_store):
    """{name: a finished store of the last two layers}"""
    made = {
        "rows": small_store(layers=[1, 2], outputs=["residue"], storage_dtype="float32"),
        "halves": small_store(layers=[1, 2], outputs=["residue"], storage_dtype="float16"),
        "pooled": small_store(layers=[1, 2], outputs=["max", "std"]),
    }
    for store in made.values():
        store.ingest("a", PROTEINS)
        store.run(shard_bytes=1 << 16)
    return made


@pytest.fixture(scope="module")
def rows(tiny_checkpoint):
    """{layer: fair-esm's [L, D] of each protein}"""
    model, found = checkpoint.reference_model(tiny_checkpoint), {1: [], 2: []}
    convert = model.alphabet.get_batch_converter()
    with torch.inference_mode():
        for name, sequence in PROTEINS.items():
            _, _, tokens = convert([(name, sequence)])
            for layer, value in model(tokens, repr_layers=[1, 2])["representations"].items():
                found[layer].append(value[0, 1:-1].double().numpy())
    return found


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("name", "kind", "rounding"),
    [("pooled", kind, 0) for kind in ("max", "std")]
    + [("rows", kind, 0) for kind in ("mean", "max", "std")]
    + [("halves", kind, 2**-11) for kind in ("mean", "max", "std")],
)
def test_pooled_vectors_are_fair_esms_whether_they_or_rows_are_stored(stores, rows, layer, name, kind, rounding):
    found = stores[name].open("a").layer(layer).pooled(kind)
    expected = np.stack([getattr(one, kind)(0) for one in rows[layer]])
    assert found.dtype == np.float32
    rms = np.sqrt(np.mean(np.square(np.concatenate(rows[layer]))))
    largest = np.stack([np.abs(one).max(0) for one in rows[layer]])
    assert (np.abs(found - expected) <= FLOAT32_TOLERANCE * rms + rounding * largest).all()


def test_a_protein_of_one_residue_deviates_by_nothing(stores):
    for name in ("rows", "pooled"):
        assert not stores[name].open("a")[["one"]].pooled("std").any()


def test_a_selection_and_duplicates_read_their_own(stores):
    ds = stores["rows"].open("a")
    assert np.array_equal(ds[["twin", "short"]].pooled("max"), ds.pooled("max")[[2, 1]])
    assert np.array_equal(ds.pooled("std")[0], ds.pooled("std")[2])


def test_a_refused_config_says_which_outputs_need_no_forward_pass(small_store, stores, refused):
    rows, pooled = stores["rows"], stores["pooled"]
    with refused(
        "outputs is [residue] there and [residue, max, std]", "max and std from stored rows", "ds.pooled('max')"
    ):
        small_store(folder=rows.folder, layers=[1, 2], outputs=["residue", "max", "std"], storage_dtype="float32")
    with refused("outputs is [max, std] there and [mean, max, std]", "mean cannot be had", "no rows of residues"):
        small_store(folder=pooled.folder, layers=[1, 2], outputs=["mean", "max", "std"])
    with refused("use another 'results' (or 'model')") as refusal:
        small_store(folder=rows.folder, layers=[1, 2], outputs=["residue", "bos"], storage_dtype="float32")
    assert str(refusal.value).endswith("use another 'results' (or 'model')")


def test_what_neither_rows_nor_vectors_give_is_refused(stores, refused):
    with refused("'bos' was not stored"):
        stores["rows"].open("a").pooled("bos")
    with refused("'mean' was not stored", "needs rows (residue)", "this store does not have"):
        stores["pooled"].open("a").pooled("mean")
    with refused("'residue' is not pooled"):
        stores["rows"].open("a").pooled("residue")


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_maximum_does_not_hide_a_number_that_is_not_finite(bad):
    packing = Packing.of([5, 4])
    hidden = torch.ones(9, 4)
    hidden[2, 1] = bad
    results = outputs.Output((1,), ("max",), "float32").pool({1: hidden}, packing)
    assert outputs.finite_status(results, packing).tolist() == [1, 0]
