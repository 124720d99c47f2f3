"""Reading a finished dataset: what fair-esm says of each record is what comes out, by id, by number, and pooled."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open

import lengthwise
from fair_esm import assert_close
from lengthwise.esm2 import checkpoint
from lengthwise.store.paths import shard_path
from lengthwise.system.files import write_json

# Rounding to float16's 11 bits of significand.
FLOAT16_TOLERANCE = 2**-11

# In the file's order: a duplicate, a rejected record and lengths that the plan sorts into another order.
PROTEINS = {
    "long": "MKVLAWWCDEFGHIKLMNPQRSTVWY" * 3,
    "sp|P1|ONE": "MKV",
    "gap": "MK-V",
    "middle": "ACDEFGHIKL" * 2,
    "twin": "MKVLAWWCDEFGHIKLMNPQRSTVWY" * 3,
    "one": "W",
    "hidden.stop": "acdefgj*",
}
WHOLE = {name: sequence for name, sequence in PROTEINS.items() if name != "gap"}
EMBEDDED = WHOLE | {"hidden.stop": "ACDEFGX"}


@pytest.fixture(scope="module")
def store(small_store):
    """A finished store in float32 of three layers and all outputs, in several shards."""
    made = small_store(layers=[0, 1, -1], default_layer=0, outputs=["residue", "mean", "bos"], storage_dtype="float32")
    made.ingest("a", PROTEINS)
    made.ingest("whole", WHOLE)
    made.run(shard_bytes=30_000)
    assert len(made.shard_files()) > 1
    return made


@pytest.fixture
def ds(store):
    return store.open("a")


@pytest.fixture(
    params=[
        "whole",
        pytest.param(
            "a",
            id="with-a-rejected-record",
        ),
    ]
)
def pooled_ds(store, request):
    """A dataset to read pooled vectors from; the ids of both are the same."""
    return store.open(request.param)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """{(id, layer): fair-esm's [L + 2, D] for it}."""
    model, found = checkpoint.reference_model(tiny_checkpoint), {}
    with torch.inference_mode():
        for name, sequence in EMBEDDED.items():
            _, _, tokens = model.alphabet.get_batch_converter()([(name, sequence)])
            for layer, value in model(tokens, repr_layers=[0, 1, 2])["representations"].items():
                found[name, layer] = value[0].numpy()
    return found


def test_ids_are_those_of_the_file_in_its_order(ds):
    assert ds.ids == list(EMBEDDED)
    assert len(ds) == len(EMBEDDED)


def test_all_records_are_listed_with_their_status(ds):
    assert dict(zip(ds.records["id"], ds.records["status"], strict=True)) == {
        **dict.fromkeys(PROTEINS, "accepted"),
        "gap": "rejected",
        "twin": "duplicate",
    }
    assert ds.records["id"].tolist() == list(PROTEINS)


@pytest.mark.parametrize("record_id", EMBEDDED)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_row_is_fair_esms_row_of_that_residue(ds, reference, record_id, layer):
    rows = ds.layer(layer)[record_id]
    assert rows.shape == (len(EMBEDDED[record_id]), 32)
    assert_close(rows, reference[record_id, layer][1:-1])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_mean_is_over_residues_alone(pooled_ds, reference, layer):
    means = pooled_ds.layer(layer).pooled("mean")
    assert means.dtype == np.float32
    assert_close(means, np.stack([reference[name, layer][1:-1].mean(0) for name in pooled_ds.ids]))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_bos_is_the_first_tokens_vector(pooled_ds, reference, layer):
    vectors = pooled_ds.layer(layer).pooled("bos")
    assert_close(vectors, np.stack([reference[name, layer][0] for name in pooled_ds.ids]))


def test_a_float16_store_has_the_float32_rows_rounded_and_the_same_means(small_store, store):
    half = small_store(layers=[0, 1, -1], default_layer=0, outputs=["residue", "mean", "bos"])
    half.ingest("whole", WHOLE)
    half.run(shard_bytes=30_000)
    ds, rounded = store.open("whole"), half.open("whole")
    for name in ds.ids:
        assert rounded[name].dtype == np.float16
        np.testing.assert_allclose(rounded[name], ds[name], rtol=FLOAT16_TOLERANCE, atol=1e-7)
    assert_close(rounded.pooled(), ds.pooled())  # pooled before the cast
    for i, name in enumerate(ds.ids):
        tolerance = FLOAT16_TOLERANCE * np.abs(ds[name]).max()
        np.testing.assert_allclose(
            rounded.pooled()[i], rounded[name].astype(np.float32).mean(0), rtol=0, atol=tolerance
        )


def test_a_duplicate_reads_the_rows_of_the_record_it_repeats(ds):
    np.testing.assert_array_equal(ds["twin"], ds["long"])
    rows = ds.records.set_index("id").loc[["twin", "long"], ["shard", "sequence_no", "row_start"]]
    assert rows.duplicated(keep=False).all()


def test_a_number_is_a_place_in_ids(ds):
    for number, name in enumerate(ds.ids):
        for key in (number, np.int64(number), number - len(ds)):
            np.testing.assert_array_equal(ds[key], ds[name])


@pytest.mark.parametrize("number", [6, -7, 1_000_000])
def test_a_number_outside_is_an_index_error(ds, number):
    with pytest.raises(IndexError, match=f"no record {number:,}: there are 6"):
        ds[number]
    with pytest.raises(IndexError, match=f"no record {number:,}: there are 6"):
        ds.ids[number]


def test_a_dataset_says_what_it_is(ds):
    assert repr(ds) == f"<lengthwise.Dataset a: 6 records, {ds.manifest['model']}, layer 0 of [0, 2, 1]>"
    assert repr(ds[:1].layer(-1)).endswith(" 1 record, " + ds.manifest["model"] + ", layer 2 of [0, 2, 1]>")


def test_a_dataset_can_be_walked_through(ds):
    assert [len(rows) for rows in ds.values()] == [len(sequence) for sequence in EMBEDDED.values()]


def test_a_record_is_in_the_dataset_unless_it_was_rejected(ds):
    assert [name in ds for name in ("one", "twin", "gap", "none")] == [True, True, False, False]


def test_a_rejected_record_raises_with_its_reason(ds):
    with pytest.raises(KeyError, match=r"'gap' was rejected: invalid_byte: '-' \(0x2D\) at position 3"):
        ds["gap"]


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("midle", "middle"),
        ("MIDDLE", "middle"),
        ("sp|P1|ON", "sp|P1|ONE"),
        ("hidden_stop", "hidden.stop"),
        ("P1", "sp|P1|ONE"),
        ("ONE", "sp|P1|ONE"),
        ("tr|one|ELSE", "one"),
        ("oNe", "sp|P1|ONE"),
        ("P1.2", "sp|P1|ONE"),
    ],
)
def test_an_id_nearly_right_is_answered_with_the_right_one(ds, asked, near):
    with pytest.raises(KeyError) as caught:
        ds[asked]
    assert f"no record {asked!r}; near it: {near}" in str(caught.value)


def test_an_id_like_no_other_suggests_nothing(ds):
    with pytest.raises(KeyError) as caught:
        ds["XXXXXXXXXXXXXXX"]
    assert str(caught.value) == "no record 'XXXXXXXXXXXXXXX'"


@pytest.mark.parametrize(("asked", "absolute"), [(-1, 2), (2, 2), (-2, 1), (0, 0), (-3, 0)])
def test_a_layer_is_asked_for_by_absolute_or_negative_index(ds, asked, absolute):
    for place in ds.records.query("status != 'rejected'").to_dict("records"):
        start = int(place["row_start"])
        with safe_open(shard_path(ds.store, place["shard"]), "numpy") as file:
            rows = file.get_slice(f"layer_{absolute}")[start : start + place["length"]]
        np.testing.assert_array_equal(ds.layer(asked)[place["id"]], rows)


def test_without_asking_the_first_stored_layer_is_read(ds):
    np.testing.assert_array_equal(ds["one"], ds.layer(0)["one"])


@pytest.fixture(scope="module")
def pooled_only(small_store):
    """A finished dataset of the last layer's means."""
    made = small_store(layers=[-1], outputs=["mean"])
    made.ingest("whole", WHOLE)
    made.run()
    return made.open("whole")


def test_what_was_not_stored_is_one_line_that_says_what_was(pooled_only, refused):
    with refused("layer 1 was not stored", "[2]"):
        pooled_only.layer(1)
    for layer in (3, 99, -4, "1"):
        with refused(f"layer {layer} was not stored", "0 to 2"):
            pooled_only.layer(layer)
    with refused("residues are not among the stored outputs"):
        pooled_only["one"]
    with refused("'bos' was not stored"):
        pooled_only.pooled("bos")


def test_a_store_of_means_alone_has_the_means_of_the_full_one(pooled_only, store):
    np.testing.assert_array_equal(pooled_only.pooled(), store.open("whole").layer(-1).pooled())


def test_residues_are_no_pooled_output(ds, refused):
    with refused("'residue'"):
        ds.pooled("residue")


def test_a_loader_with_workers_gives_every_record(ds):
    loader = torch.utils.data.DataLoader(ds.torch(), batch_size=2, num_workers=2, collate_fn=list)
    items = [item for batch in loader for item in batch]
    assert [name for name, _ in items] == ds.ids
    for name, rows in items:
        np.testing.assert_array_equal(rows.numpy(), ds[name])


def test_a_dataset_goes_to_spawned_workers_without_its_rows(ds):
    before = len(pickle.dumps((ds, ds.records, ds.ids)))
    read = sum(ds[name].nbytes for name in ds.ids)
    sent = pickle.dumps(ds)
    np.testing.assert_array_equal(pickle.loads(sent)["long"], ds["long"])
    assert len(sent) < before + read / 4  # headers of shards, but not their rows


@pytest.mark.parametrize("number", [6, -7])
def test_a_torch_dataset_ends_where_the_ids_end(ds, number):
    with pytest.raises(IndexError):
        ds.torch()[number]


def test_writing_into_an_array_changes_no_file(store, ds):
    before = [path.read_bytes() for path in store.shard_files()]
    for name in ds.ids:
        ds[name][:] = 7
        ds.torch()[0][1][:] = 7
    assert [path.read_bytes() for path in store.shard_files()] == before
    assert store.open("a").verify() == len(store.open("a").records)


def test_random_weights_warn_at_the_callers_line(store):
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS") as caught:
        lengthwise.open(store.path / "datasets" / "a")
    assert caught[0].filename == __file__


def test_weights_that_are_not_random_do_not_warn(small_store, tiny_checkpoint, tmp_path):
    data = torch.load(tiny_checkpoint, weights_only=False)
    delattr(data["cfg"]["model"], "lengthwise_random_seed")
    torch.save(data, tmp_path / "real.pt")
    store = small_store(checkpoint=tmp_path / "real.pt")
    store.ingest("a", {"x": "MKV"})
    store.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lengthwise.open(store.path / "datasets" / "a")


def test_an_unfinished_dataset_is_one_line(tmp_path, refused):
    with refused(str(tmp_path), "no finished dataset", "snakemake"):
        lengthwise.open(tmp_path)


def test_a_damaged_manifest_is_one_line(tmp_path, refused):
    (tmp_path / "manifest.json").write_text('{"schema": 1, "dat')
    with refused("manifest.json"):
        lengthwise.open(tmp_path)


def test_a_dataset_without_an_accepted_record_is_empty(small_store):
    made = small_store()
    made.ingest("none", {"x": "M-K"})
    made.run()
    empty = made.open("none")
    assert (empty.ids, len(empty), empty.pooled().shape, empty.verify()) == ([], 0, (0, 32), 1)
    with pytest.raises(KeyError, match="rejected"):
        empty["x"]


@pytest.fixture
def own_store(small_store):
    """A finished store to spoil."""
    made = small_store()
    made.ingest("a", PROTEINS)
    made.run()
    return made


def test_verify_names_the_damaged_shard(own_store, refused):
    (path,) = own_store.shard_files()
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    with refused(str(path), "1 sequences are damaged, number 0 the first"):
        own_store.open("a").verify()


@pytest.mark.parametrize("words", [["missing"], ["damaged shard"]], ids=["removed", "truncated"])
def test_a_lost_shard_is_one_line_when_it_is_read(own_store, refused, words):
    (path,) = own_store.shard_files()
    size = path.stat().st_size
    path.unlink()
    if words == ["damaged shard"]:
        path.write_bytes(b"\0" * size)
    for read in (lambda ds: ds["one"], lambda ds: ds.pooled(), lambda ds: ds.verify()):
        with refused(str(path), *words):
            read(own_store.open("a"))


def test_reading_gives_the_highest_layer_and_repr_says_which(small_store, random_proteins):
    store = small_store(layers=[0, -1])
    store.ingest("a", random_proteins(3))
    store.run()
    ds = store.open("a")
    assert ds.layers == [2, 0]
    assert "layer 2 of [2, 0]" in repr(ds)
    assert "layer 0 of [2, 0]" in repr(ds.layer(0))
    assert np.array_equal(ds["p0"], ds.layer(-1)["p0"])
    assert not np.array_equal(ds["p0"], ds.layer(0)["p0"])
    assert np.array_equal(ds.pooled(), ds.layer(2).pooled())


def test_a_store_of_before_reads_its_first_layer(small_store, random_proteins):
    store = small_store(layers=[0, -1])
    write_json(store.path / "settings.json", {**store.settings, "layers": [0, 2]})  # as an earlier version wrote it
    store.ingest("a", random_proteins(3))
    store.run()
    ds = store.open("a")
    assert "layer 0 of [0, 2]" in repr(ds)
    assert np.array_equal(ds["p0"], ds.layer(0)["p0"])
