"""A dataset as a mapping: ids, items, frames, sequences, accessions; several datasets joined; a store of datasets."""

import pickle
import shutil
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import lengthwise
from lengthwise.ingest.ingest import ingest

PROTEINS = {
    "sp|P69905|HBA_HUMAN": "MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHF",
    "sp|P68871|HBB_HUMAN": "MVHLTPEEKSAVTALWGKVNVDEVGGEALGRLLVVYPWTQRFFESFGDL",
    "gap": "MK-V",
    "lower": "acdefgrgdj*",
    "sp|Q00001|ONE": "MKVA",
    "tr|Q00001|TWO": "MKVC",
    "again": "MKVA",
    "sp|P00001|GONE": "MK1",
    "sp|P69905-2|HBA_HUMAN": "MVLSPADKTN",
}
EMBEDDED = {name: text for name, text in PROTEINS.items() if name not in ("gap", "sp|P00001|GONE")} | {
    "lower": "ACDEFGRGDX"
}
OTHER = {"new": "WWYYRGD", "sp|P69905|HBA_HUMAN": PROTEINS["sp|P69905|HBA_HUMAN"], "bad": "M*K"}

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")


@pytest.fixture(scope="module")
def store(small_store):
    made = small_store(layers=[0, -1], outputs=["residue", "mean", "bos"])
    made.ingest("a", PROTEINS)
    made.ingest("b", OTHER)
    made.run(shard_bytes=12_000)
    assert len(made.shard_files()) > 1
    return made


@pytest.fixture
def ds(store):
    return store.open("a")


@pytest.fixture
def other(store):
    return store.open("b")


def test_a_dataset_is_a_mapping_of_ids_to_arrays(ds):
    assert isinstance(ds, Mapping)
    assert list(ds) == list(ds.keys()) == list(EMBEDDED)
    assert {name: len(rows) for name, rows in ds.items()} == {name: len(text) for name, text in EMBEDDED.items()}
    assert [len(rows) for rows in ds.values()] == [len(text) for text in EMBEDDED.values()]
    assert (len(ds), len(ds.items()), len(ds.values())) == (len(EMBEDDED),) * 3
    assert ("lower" in ds, "gap" in ds, "none" in ds, 0 in ds) == (True, False, False, False)
    assert (ds.get("gap"), ds.get("gap", 7)) == (None, 7)
    np.testing.assert_array_equal(ds.get("lower"), ds["lower"])
    assert ds.keys() & {"lower", "none"} == {"lower"}
    assert (ds == ds[:], ds == ds, len({ds, ds})) == (False, True, 1)
    assert [name for name, _ in ds[::-1].items()] == list(EMBEDDED)[::-1]
    np.testing.assert_array_equal(dict(ds)["again"], ds["sp|Q00001|ONE"])


# ---- accessions


def test_an_accession_stands_for_the_id_that_has_it(ds):
    np.testing.assert_array_equal(ds["P69905"], ds["sp|P69905|HBA_HUMAN"])
    np.testing.assert_array_equal(ds["P69905-2"], ds["sp|P69905-2|HBA_HUMAN"])
    assert ds[["P68871", "lower"]].ids == ["sp|P68871|HBB_HUMAN", "lower"]
    assert ("P69905" in ds, "Q00001" in ds, "P00001" in ds, "P99999" in ds) == (True, False, False, False)
    assert "P69905" not in ds.ids
    assert ds.sequence("P68871") == EMBEDDED["sp|P68871|HBB_HUMAN"]


def test_an_accession_of_two_ids_names_them(ds):
    with pytest.raises(KeyError, match=r"'Q00001' is the accession of 2 ids: sp\|Q00001\|ONE, tr\|Q00001\|TWO"):
        ds["Q00001"]
    np.testing.assert_array_equal(ds[ds.ids.index("tr|Q00001|TWO") :]["Q00001"], ds["tr|Q00001|TWO"])


def test_an_accession_that_cannot_be_read_says_why(ds):
    with pytest.raises(KeyError, match="'P00001' was rejected: invalid_byte"):
        ds["P00001"]
    with pytest.raises(KeyError, match="no record 'P99999'"):
        ds["P99999"]
    with pytest.raises(KeyError, match="'P69905' is not among the 2 selected records"):
        ds[1:3]["P69905"]


def test_ids_that_are_accessions_come_first(small_store):
    made = small_store()
    made.ingest("c", {"sp|P69905|X": "MKV", "P69905": "MAV"})
    made.run()
    assert made.open("c").sequence("P69905") == "MAV"


# ---- frames, sequences, digests


@pytest.mark.parametrize("kind", ["mean", "bos"])
def test_a_frame_has_a_row_of_pooled_numbers_for_each_id(ds, kind):
    frame = ds[[2, 0]].frame(kind)
    assert frame.index.name == "id"
    assert frame.index.tolist() == [ds.ids[2], ds.ids[0]]
    np.testing.assert_array_equal(frame.to_numpy(), ds.pooled(kind)[[2, 0]])
    assert (frame.dtypes == np.float32).all()
    assert ds[[]].frame(kind).shape == (0, 32)


def test_sequences_are_the_residues_that_were_embedded(ds):
    assert {name: ds.sequence(name) for name in ds} == EMBEDDED
    assert ds.sequence(-1) == EMBEDDED["sp|P69905-2|HBA_HUMAN"]
    series = ds.sequences
    assert series.to_dict() == EMBEDDED
    assert series.index.tolist() == list(ds)
    assert ds[series.str.contains("RGD")].ids == ["lower"]
    assert ds[[5, 0]].sequences.tolist() == [EMBEDDED["again"], EMBEDDED["sp|P69905|HBA_HUMAN"]]
    assert ds[[]].sequences.tolist() == []
    for key, error in (("gap", KeyError), (99, IndexError), (None, TypeError)):
        with pytest.raises(error):
            ds.sequence(key)


def test_sequences_of_many_row_groups_are_found(small_store, random_proteins, monkeypatch):
    from lengthwise.ingest import tables

    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 7)
    monkeypatch.setattr("lengthwise.ingest.fasta.decompress.BLOCK_BYTES", 2_000)
    proteins = random_proteins(60)
    made = small_store(outputs=["mean"])
    made.ingest("many", proteins)
    assert pq.read_metadata(made.inputs("many") / "sequences.parquet").num_row_groups >= 3
    made.run()
    ds = made.open("many")
    assert ds.sequences.to_dict() == proteins
    shuffled = np.random.default_rng(0).permutation(60)
    assert ds[shuffled].sequences.tolist() == [list(proteins.values())[i] for i in shuffled]
    assert ds.sequence("p33") == proteins["p33"]


def test_a_condition_may_name_the_sequence_and_reads_it_only_then(ds, store, tmp_path):
    assert ds.where("sequence LIKE '%RGD%'").ids == ["lower"]
    assert ds[::-1].where("SEQUENCE = 'MKVA' OR length > 48").ids == ["again", "sp|Q00001|ONE", "sp|P68871|HBB_HUMAN"]
    moved = store.copy(tmp_path)
    (moved.inputs("a") / "sequences.parquet").unlink()
    assert moved.open("a").where("sequence_no >= 0 AND digest LIKE 'SQ.%'").ids == list(EMBEDDED)


@pytest.mark.parametrize("how", ["gone", "cut", "another"])
def test_without_its_table_of_sequences_a_dataset_gives_none(store, tmp_path, refused, how):
    moved = store.copy(tmp_path)
    path = moved.inputs("a") / "sequences.parquet"
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:-100])
    if how == "another":
        shutil.copy(moved.inputs("b") / "sequences.parquet", path)
    ds = moved.open("a")
    for read in (lambda: ds.sequence("lower"), lambda: ds.sequences, lambda: ds.where("sequence <> ''")):
        with refused(str(path), "run snakemake"):
            read()
    assert len(ds["lower"]) == 10


def test_a_sequence_that_is_not_the_one_of_its_digest_is_refused(store, tmp_path, refused):
    moved = store.copy(tmp_path)
    path = moved.inputs("a") / "sequences.parquet"
    table = pq.read_table(path)
    texts = table["sequence"].to_pylist()
    texts[2] = b"A" * len(texts[2])
    path.unlink()
    pq.write_table(table.set_column(2, "sequence", pa.array(texts, pa.binary())), path)
    ds = moved.open("a")
    assert ds.sequence(0) == EMBEDDED["sp|P69905|HBA_HUMAN"]
    with refused(str(path), "is damaged"):
        ds.sequence("lower")


def test_digests_read_as_refget_names(ds):
    import base64
    import hashlib

    records = ds.records.set_index("id")
    for name, text in EMBEDDED.items():
        raw = hashlib.sha512(text.encode()).digest()[:24]
        assert records.loc[name, "digest"] == "SQ." + base64.urlsafe_b64encode(raw).decode()
    assert pd.isna(records.loc["gap", "digest"])
    chosen = records.loc["again", "digest"]
    assert ds.where(f"digest = '{chosen}'").ids == ["sp|Q00001|ONE", "again"]


def test_records_are_those_of_the_index_with_digests_as_text_and_the_file(ds, store):
    stored = pd.read_parquet(ds.path / "index.parquet")
    pd.testing.assert_frame_equal(ds.records.drop(columns=["digest", "file"]), stored.drop(columns="digest"))
    fasta = str(store.folder / "a.fasta")
    assert ds.records["file"].unique().tolist() == [fasta]
    assert ds.where(f"file = '{fasta}'").ids == ds.ids


# ---- masks, torch


def test_a_mask_over_the_records_explains_itself(ds):
    short = ds.records["length"] < 11
    with pytest.raises(IndexError, match=r"the mask has 9 bools for 7 records: ds.records lists the rejected ones too"):
        ds[short]
    with pytest.raises(IndexError, match=r"for 7 records$"):
        ds[[True] * 8]
    kept = ds.records[ds.records["status"] != "rejected"]
    assert ds[kept["length"] < 11].ids == ds.where("length < 11").ids


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_torch_gives_the_type_that_is_asked_for(ds, dtype):
    data = pickle.loads(pickle.dumps(ds.torch(dtype)))
    assert {rows.dtype for _, rows in data} == {dtype or torch.float16}
    name, rows = data[0]
    assert torch.equal(rows, torch.from_numpy(ds[name].copy()).to(rows.dtype))
    batch = next(iter(DataLoader(ds.torch(dtype=torch.float32), batch_size=3, collate_fn=data.pad)))
    torch.nn.Linear(32, 2)(batch.rows).sum().backward()  # without a cast


# ---- concat


def test_joined_datasets_read_like_one(ds, other):
    both = lengthwise.concat([ds, other])
    wanted = [*ds.items(), *other.items()]
    assert list(both) == [name for name, _ in wanted]
    for number, (name, rows) in enumerate(both.items()):
        np.testing.assert_array_equal(rows, wanted[number][1])
        np.testing.assert_array_equal(both[name], rows)
    assert len(both) == len(wanted) == 9
    for kind in ("mean", "bos"):
        np.testing.assert_array_equal(both.pooled(kind), np.concatenate([ds.pooled(kind), other.pooled(kind)]))
    np.testing.assert_array_equal(both.layer(0)["new"], other.layer(0)["new"])
    assert sorted(name for name, _ in both.in_storage_order()) == sorted(both)
    for name, rows in both.in_storage_order():
        np.testing.assert_array_equal(rows, both[name])
    assert both.sequences.tolist() == [*ds.sequences, *other.sequences]
    assert both.frame().index.tolist() == list(both)
    assert both.verify() == 12
    assert repr(both) == f"<lengthwise.Joined: 9 records of 2 datasets, {ds.settings['model']}, layer 2 of [2, 0]>"
    np.testing.assert_array_equal(both["P68871"], ds["P68871"])
    with pytest.raises(KeyError, match="'Q00001' is the accession of 2 ids"):
        both["Q00001"]
    with pytest.raises(KeyError, match="'bad' was rejected"):
        both["bad"]


def test_a_selection_of_joined_datasets_keeps_its_order(ds, other):
    both = lengthwise.concat([ds, other])
    chosen = both[["new", "lower", "P68871"]]
    assert list(chosen) == ["new", "lower", "sp|P68871|HBB_HUMAN"]
    assert chosen.records["id"].tolist() == list(chosen)
    assert chosen.records["dataset"].tolist() == ["b", "a", "a"]
    assert chosen.sequences.tolist() == [OTHER["new"], EMBEDDED["lower"], EMBEDDED["sp|P68871|HBB_HUMAN"]]
    np.testing.assert_array_equal(
        chosen.pooled(), np.stack([both.frame().loc[name] for name in ("new", "lower", chosen.ids[2])])
    )
    assert both.where("sequence LIKE '%RGD%'").ids == ["lower", "new"]
    assert both[::-1].where("length < 10").ids == ["new", "again", "tr|Q00001|TWO", "sp|Q00001|ONE"]
    with pytest.raises(KeyError, match="'again' is not among the 3 selected records"):
        chosen["again"]
    records = both.records
    assert records["id"].tolist() == [*PROTEINS, *OTHER]
    with pytest.raises(IndexError, match=r"the mask has 12 bools for 9 records: ds.records lists"):
        both[records["length"] > 0]
    assert both[[]].pooled().shape == (0, 32)
    assert both[[]].records.columns.tolist() == records.columns.tolist()


def test_selections_and_joined_datasets_can_be_joined(ds, other):
    nested = lengthwise.concat([lengthwise.concat([other, ds[[4, 2, 4]]])[::-1], ds[:2]])
    wanted = [ds.ids[4], ds.ids[2], ds.ids[4], *other.ids[::-1], *ds.ids[:2]]
    assert list(nested) == wanted
    for name, rows in nested.items():
        np.testing.assert_array_equal(rows, (other if name == "new" else ds)[name])
        np.testing.assert_array_equal(nested[name], rows)
    again = pickle.loads(pickle.dumps(nested[1:]))
    assert list(again) == wanted[1:]
    np.testing.assert_array_equal(again.pooled(), nested.pooled()[1:])
    loader = DataLoader(nested.torch(dtype=torch.float32), batch_size=2, num_workers=1, collate_fn=nested.torch().pad)
    assert [name for batch in loader for name in batch.ids] == wanted


def test_datasets_of_other_numbers_are_not_joined(ds, other, small_store, refused):
    made = small_store(layers=[0, -1], outputs=["residue", "mean", "bos"], storage_dtype="float32")
    made.ingest("c", {"x": "MKV"})
    made.run()
    with refused("concat", "storage_dtype is float16 in one and float32 in the other"):
        lengthwise.concat([ds, made.open("c")])
    with refused("concat", "read different layers", "layer(n)"):
        lengthwise.concat([ds, other.layer(0)])
    with refused("concat: there is no dataset"):
        lengthwise.concat([])
    with pytest.raises(TypeError, match="concat takes a list of datasets; 'a' is none"):
        lengthwise.concat(["a"])


def test_one_id_for_two_sequences_is_not_joined(store, small_store, ds, refused):
    made = small_store(layers=[0, -1], outputs=["residue", "mean", "bos"])
    made.ingest("c", {"x": "MKV", "lower": "ACDEFG"})
    made.run()
    other = made.open("c")
    with refused("concat: 'lower' names two different sequences", "Dataset a", "Dataset c"):
        lengthwise.concat([ds, other])
    assert list(lengthwise.concat([ds[:2], other])) == [*ds.ids[:2], "x", "lower"]


def test_repeated_ids_of_one_sequence_are_all_there(small_store):
    made = small_store()
    made.ingest("b", {"x": "MKV", "y": "MAV"})
    fasta = made.folder / "b.fasta"
    fasta.write_text(">x\nMKV\n>y\nMAV\n>x\nMKV\n")
    ingest(fasta, *(made.inputs("b") / name for name in ("records.parquet", "sequences.parquet", "summary.json")))
    made.run()
    ds = made.open("b")
    assert [name for name, _ in ds.items()] == ["x", "y", "x"]
    assert list(lengthwise.concat([ds, ds[2:]])) == ["x", "y", "x", "x"]
    assert ds.frame().index.tolist() == ["x", "y", "x"]


# ---- a store


def test_a_store_opens_as_its_datasets_by_name(store):
    opened = lengthwise.open(str(store.path))
    assert isinstance(opened, Mapping)
    assert list(opened) == ["a", "b"]
    assert list(opened["a"]) == list(EMBEDDED)
    assert {name: len(ds) for name, ds in opened.items()} == {"a": 7, "b": 2}
    assert repr(opened) == "<lengthwise.Store tiny: 2 datasets: a, b>"
    assert ("b" in opened, "c" in opened) == (True, False)
    with pytest.raises(KeyError, match=r"no finished dataset 'c' .* there are: a, b"):
        opened["c"]
    assert len(lengthwise.concat(opened.values())) == 9


def test_a_store_has_its_finished_datasets_alone(store, tmp_path, refused):
    moved = store.copy(tmp_path)
    (moved.path / "datasets/b/manifest.json").unlink()
    opened = lengthwise.open(moved.path)
    assert list(opened) == ["a"]
    with pytest.raises(KeyError, match="no finished dataset 'b'"):
        opened["b"]
    (moved.path / "datasets/a/manifest.json").unlink()
    with refused(str(moved.path), "no dataset in this store is finished", "run snakemake"):
        lengthwise.open(moved.path)
    with refused("no such folder"):
        lengthwise.open(moved.path / "datasets" / "c")
