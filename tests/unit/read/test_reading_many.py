"""Reading many records: selections, conditions, the lookup, storage order, batches for torch; and never wrong rows."""

import doctest
import gc
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

import lengthwise
from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.read import dataset, embeddings
from lengthwise.read import store as read_store
from lengthwise.read import torch as torch_module
from lengthwise.store import lookup
from lengthwise.store.lookup import LOOKUP
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.store.settings import fingerprint
from lengthwise.store.shard import Shard
from lengthwise.system.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def proteins(random_proteins):
    """Sixty in random order of length, one that repeats another, one that is rejected, and ids of two kinds."""
    made = random_proteins(60, longest=400)
    made = {(name if i % 3 else f"sp|{name}|X_Y"): sequence for i, (name, sequence) in enumerate(made.items())}
    return made | {"again": made["p1"], "gap": "MK-V"}


@pytest.fixture(scope="module")
def store(small_store, proteins):
    """A store of two layers in at least ten shards."""
    made = small_store(layers=[0, -1], default_layer=0, outputs=["residue", "mean"])
    made.ingest("a", proteins)
    made.run(shard_bytes=120_000)
    assert len(made.shard_files()) >= 10
    return made


@pytest.fixture
def ds(store):
    return store.open("a")


pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")


@pytest.fixture
def own(store, tmp_path):
    """A copy of the store to spoil: opens its dataset."""
    shutil.copytree(store.path, tmp_path / "tiny")

    def open_copy():
        return dataset.Dataset(tmp_path / "tiny" / "datasets" / "a")

    return open_copy


@pytest.fixture(scope="module")
def stored(store):
    """{id: rows}, read by the stock safetensors library and pandas."""
    import pandas as pd
    from safetensors.numpy import load_file

    shards = {path.stem: load_file(path) for path in store.shard_files()}
    frame = pd.read_parquet(store.path / "datasets/a/index.parquet").query("status != 'rejected'")
    return {
        row.id: shards[row.shard]["layer_0"][int(row.row_start) : int(row.row_start) + row.length]
        for row in frame.itertuples()
    }


def assert_same(ds, ids, stored):
    """This dataset has these records, by every way of asking."""
    ids = list(ids)
    assert ds.ids == ids
    assert len(ds) == len(ids)
    assert list(ds) == list(ds.keys()) == ids
    assert [name for name, _ in ds.items()] == ids
    for number, (name, rows) in enumerate(zip(ids, ds.values(), strict=True)):
        for read in (rows, ds[name], ds[number], ds[number - len(ids)]):
            np.testing.assert_array_equal(read, stored[name])


# ---- selections


@pytest.mark.parametrize("key", [slice(3, 9), slice(None), slice(None, None, -1), slice(50, 10, -7), slice(9, 3)])
def test_a_slice_is_the_dataset_of_those_records(ds, stored, key):
    assert_same(ds[key], list(stored)[key], stored)


@pytest.mark.parametrize("kind", [list, np.array, tuple])
def test_a_list_of_ids_numbers_or_bools_is_the_dataset_of_those_records_in_that_order(ds, stored, kind):
    ids = list(stored)
    numbers = [7, 2, 60, -1, 2]
    wanted = [ids[i] for i in numbers]
    assert_same(ds[kind(wanted)], wanted, stored)
    assert_same(ds[kind(numbers)], wanted, stored)
    mask = [i % 5 == 0 for i in range(len(ids))]
    assert_same(ds[kind(mask)], ids[::5], stored)
    assert_same(ds[kind([])], [], stored)


def test_a_selection_can_be_selected_from(ds, stored):
    ids = list(stored)
    assert_same(ds[10:40][::-3][[2, 0]], [ids[33], ids[39]], stored)
    assert_same(ds[[5, 3, 1]].where("length > 0")[1:], [ids[3], ids[1]], stored)
    np.testing.assert_array_equal(ds[[5, 3]].layer(-1)[0], ds.layer(-1)[5])


def test_a_selection_lists_its_own_records(ds):
    chosen = ds[[8, 2]]
    assert chosen.records["id"].tolist() == list(chosen.ids)
    assert chosen.records["length"].tolist() == [len(rows) for rows in chosen.values()]
    assert "gap" not in ds[:].where("true").records["id"].tolist()


def test_a_selection_has_no_other_records(ds):
    chosen = ds[["p1", "p4"]]
    assert [name in chosen for name in ("p1", "p4", "p2", "gap")] == [True, True, False, False]
    with pytest.raises(KeyError, match="'p2' is not among the 2 selected records"):
        chosen["p2"]
    with pytest.raises(KeyError, match="'gap' was rejected: invalid_byte"):
        chosen["gap"]
    with pytest.raises(IndexError):
        chosen[2]


def test_a_repeated_id_is_found_in_a_selection_of_the_second_alone(small_store):
    made = small_store()
    fasta = made.folder / "b.fasta"
    made.ingest("b", {"x": "MKV", "y": "MAV"})
    fasta.write_text(">x\nMKV\n>y\nMAV\n>x\nMKV\n")
    from lengthwise.ingest.ingest import ingest

    ingest(fasta, *(made.inputs("b") / name for name in ("records.parquet", "sequences.parquet", "summary.json")))
    made.run()
    ds = made.open("b")
    assert ds.ids == ["x", "y", "x"]
    assert "x" in ds[2:]
    assert "x" not in ds[1:2]
    np.testing.assert_array_equal(ds[2:]["x"], ds["x"])


@pytest.mark.parametrize(
    "key", [1.5, None, b"p1", True, {"p1": 0}.items(), [["p1"]], [1.0], [None], [True, 5], [5, True]]
)
def test_what_is_no_id_and_no_number_is_a_type_error(ds, key):
    with pytest.raises(TypeError, match="select records by an id, a number"):
        ds[key]


def test_a_mask_of_another_length_is_an_error(ds):
    with pytest.raises(IndexError, match="the mask has 2 bools for 61 records"):
        ds[[True, False]]


def test_a_torch_dataset_has_numbers_alone(ds):
    with pytest.raises(TypeError, match="'p1' is not a number"):
        ds.torch()["p1"]


@pytest.mark.parametrize("collate", [torch_module.TorchDataset.pad, torch_module.TorchDataset.pack])
def test_a_batch_of_nothing_is_one_clear_error(collate):
    with pytest.raises(ValueError, match="an empty batch"):
        collate([])


def test_ids_are_a_sequence(ds, stored):
    ids = list(stored)
    assert (ds.ids[3], ds.ids[-1], list(ds.ids[2:5])) == (ids[3], ids[-1], ids[2:5])
    assert ("p1" in ds.ids, "gap" in ds.ids, 7 in ds.ids) == (True, False, False)
    assert ds.ids.index("p4") == ids.index("p4")
    assert ds.ids != ids[:-1]
    assert ds.ids != [*ids[:-1], "other"]
    assert repr(ds.ids).startswith(f"[{ids[0]!r}, {ids[1]!r}, ")
    assert pickle.loads(pickle.dumps(ds.ids)) == ids
    assert repr(ds[:1].ids) == repr(ids[:1])


# ---- conditions


@pytest.mark.parametrize(
    ("condition", "as_pandas"),
    [
        ("length < 200", "length < 200"),
        ("length < 200 AND id LIKE 'sp|%'", "length < 200 and id.str.startswith('sp|')"),
        ("status = 'duplicate'", "status == 'duplicate'"),
        ("length > (SELECT avg(length) FROM records)", "length > length.mean()"),
        ("false", "length < 0"),
        ("id = 'gap'", "length < 0"),
        ("length < 200 -- and a comment", "length < 200"),
    ],
)
def test_a_condition_chooses_what_pandas_chooses(ds, stored, condition, as_pandas):
    chosen = ds.records.query(as_pandas).query("status != 'rejected'")["id"]
    assert_same(ds.where(condition), chosen, stored)


def test_a_condition_keeps_the_order_of_a_selection(ds, stored):
    chosen = ds[::-1].where("length < 200")
    assert_same(chosen, [name for name in reversed(stored) if len(stored[name]) < 200], stored)


SECRET = "secret.csv"


@pytest.mark.parametrize(
    ("condition", "word"),
    [
        ("lenth < 3", '"lenth" not found'),
        ("length <", "syntax error"),
        ("", "is not a condition"),
        ("length", "is not a condition"),
        ("NULL", "is not a condition"),
        ("true), (false", "is not a condition"),
        ("length < 3) AS chosen, (true", "is not a condition"),
        ("sum(length) > 3", "GROUP BY"),
        ("id < 3", "Binder Error"),
        ("length < 3 ORDER BY id", "syntax error"),
        ("true; DROP VIEW records", "syntax error"),
        ("true); DROP VIEW records; SELECT (true", "Parser Error"),
        (f"EXISTS (FROM read_csv('{SECRET}'))", "Permission Error"),
        (f"EXISTS (FROM '{SECRET}')", "Permission Error"),
        (f"(SELECT content FROM read_text('{SECRET}')) LIKE '%a%'", "Permission Error"),
        ("EXISTS (FROM read_csv('/etc/passwd'))", "Permission Error"),
        ("EXISTS (FROM glob('/*'))", "Permission Error"),
        ("EXISTS (FROM read_parquet('../b/index.parquet'))", "Permission Error"),
        ("EXISTS (FROM a_local_table)", "does not exist"),
        ("COPY records TO 'stolen.csv'", "syntax error"),
        ("true); COPY records TO 'stolen.csv'; SELECT (true", "Parser Error"),
        ("ATTACH 'stolen.db'", "Error"),
        ("SET enable_external_access = true", "syntax error"),
        ("INSTALL httpfs", "Error"),
    ],
)
def test_a_condition_is_one_condition_over_the_records_and_reaches_nothing_else(
    ds, refused, tmp_path, monkeypatch, condition, word
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SECRET).write_text("a\n1\n")
    a_local_table = pa.table({"x": [1]})
    with refused(f"where({condition!r})", word):
        ds.where(condition)
    assert a_local_table.num_rows == 1
    assert [path.name for path in tmp_path.iterdir()] == [SECRET]


def test_a_folder_with_any_name_can_be_asked(store, tmp_path):
    odd = tmp_path / "it's [1] *; \U0001f9ec" / "tiny"
    shutil.copytree(store.path, odd)
    assert len(lengthwise.open(odd / "datasets" / "a").where("length > 0")) == 61


# ---- storage order, pooling, bounds


def test_storage_order_goes_through_each_shard_once_from_front_to_back(ds, stored):
    frame = ds.records.query("status != 'rejected'").set_index("id")
    walked = dict(ds.in_storage_order())
    assert sorted(walked) == sorted(stored)
    places = frame.loc[list(walked), ["shard", "row_start"]]
    assert (places["shard"] != places["shard"].shift()).sum() == places["shard"].nunique()
    assert all(starts.is_monotonic_increasing for _, starts in places.groupby("shard")["row_start"])
    for name, rows in walked.items():
        np.testing.assert_array_equal(rows, stored[name])
    assert [name for name, _ in ds[[3, 3]].in_storage_order()] == [ds.ids[3]] * 2


def test_a_selection_pools_its_own_records_in_its_order(ds):
    numbers = [9, 2, 60, 2]
    np.testing.assert_array_equal(ds[numbers].pooled(), ds.pooled()[numbers])
    assert ds[[]].pooled().shape == (0, 32)


def mapped_shards() -> int:
    return sum(".safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_few_shards_stay_mapped_however_many_are_read(store, stored, monkeypatch):
    monkeypatch.setattr(dataset, "OPEN_SHARDS", 3)
    ds, before = store.open("a"), mapped_shards()
    for name in stored:
        np.testing.assert_array_equal(ds.layer(0)[name], stored[name])
        assert mapped_shards() - before <= 3 + 1


def test_a_dataset_that_is_dropped_lets_go_of_its_files_at_once(store):
    before = mapped_shards()
    gc.disable()
    try:
        ds = store.open("a")
        ds["p1"]
        assert mapped_shards() > before
        del ds
        assert mapped_shards() == before
    finally:
        gc.enable()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="maps take no file descriptors")
def test_more_arrays_than_files_may_be_open_is_one_line(store, refused):
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ds = store.open("a")
    ds.where("true")  # whatever opens a file once has opened it
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, hard))
    try:
        with refused("too many arrays of different shards are held", "np.array(ds[...])"):
            held += [rows for _, rows in ds.in_storage_order()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


# ---- the lookup


def test_without_a_lookup_all_reads_the_same(own, stored):
    path = own().path / LOOKUP
    assert path.exists()
    path.unlink()
    assert_same(own(), stored, stored)
    assert own().where("length > 0").ids == list(stored)
    assert not path.exists()
    assert own().verify() == 62


def test_a_lookup_of_another_index_is_not_believed(store, own, small_store, stored, random_proteins):
    other = small_store(layers=[0, -1], default_layer=0, outputs=["residue", "mean"])
    other.ingest("a", random_proteins(61, seed=1))
    other.run()
    shutil.copy(other.path / "datasets/a" / LOOKUP, own().path / LOOKUP)
    assert_same(own(), stored, stored)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"\0" * 5000, None])
def test_a_damaged_lookup_is_one_line(own, refused, content):
    path = own().path / LOOKUP
    path.write_bytes(path.read_bytes()[:-2000] if content is None else content)
    with refused("index.parquet", LOOKUP, "run snakemake"):
        own()


def test_a_flipped_bit_in_the_lookup_never_gives_wrong_rows_and_verify_finds_it(own, stored):
    path = own().path / LOOKUP
    whole, rng, found = path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.choice(len(whole), 30, replace=False):
        data = bytearray(whole)
        data[place] ^= 1 << rng.integers(8)
        path.unlink()
        path.write_bytes(data)
        try:
            ds = own()
            ids, wrong = list(stored), 0
            for number, name in enumerate(ids):
                try:
                    np.testing.assert_array_equal(ds[name], stored[name])
                except (KeyError, LengthwiseError):
                    wrong += 1
                try:
                    np.testing.assert_array_equal(ds[number], stored[name])
                except LengthwiseError:
                    wrong += 1
            if wrong:
                with pytest.raises(LengthwiseError):
                    ds.verify()
            found += bool(wrong)
        except LengthwiseError:
            found += 1
    assert found > 5  # the others were padding


def test_ids_with_the_same_hash_are_told_apart(own, stored, monkeypatch):
    monkeypatch.setattr(lookup, "hash_id", lambda record_id: np.uint64(7))
    path = own().path / LOOKUP
    table = pa.ipc.open_file(path).read_all()
    same = table.set_column(
        table.schema.get_field_index("hash"), "hash", pa.array([7] * len(table), pa.uint64())
    ).replace_schema_metadata(table.schema.metadata)
    path.unlink()
    with pa.ipc.new_file(path, same.schema) as file:
        file.write_table(same)
    assert_same(own(), stored, stored)
    assert "none" not in own()


def test_an_id_of_any_letters_is_found(small_store):
    ids = ["\U0001f9ec", "it's;--", "x" * 10_000, "../../etc", "p|", "|", "%", "é"]
    made = small_store()
    made.ingest("odd", dict(zip(ids, [f"MKV{letter}" for letter in "ACDEFGHI"], strict=True)))
    made.run()
    ds = made.open("odd")
    assert ds.ids == ids
    assert [len(ds[name]) for name in ids] == [4] * 8
    for name in ("\ud800", "", "it's", "\0"):
        assert name not in ds
        with pytest.raises(KeyError) as caught:
            ds[name]
        assert "no record" in str(caught.value)


def test_catching_a_missing_record_looks_for_none_near_it(ds, monkeypatch):
    monkeypatch.setattr(lookup.Index, "explain", lambda *_: pytest.fail("looked"))
    with pytest.raises(KeyError):
        ds["none"]


def test_a_missing_record_can_be_sent_to_another_process(ds):
    with pytest.raises(KeyError) as caught:
        ds["p111"]
    sent = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(sent, KeyError)
    assert "no record 'p111'; near it: p11" in sent.args[0]


# ---- never wrong rows


def test_a_shard_of_other_sequences_is_refused(own, refused):
    ds = own()
    frame = ds.records.query("status != 'rejected'")
    one, other = frame["shard"].unique()[:2]
    path = {name: ds.store / "shards" / name[:2] / f"{name}.safetensors" for name in (one, other)}
    shutil.copy(path[other], path[one])
    numbers = np.flatnonzero(frame["shard"] == one)
    for number in numbers:
        with refused(str(path[one]), "does not hold what the index", "run snakemake"):
            ds[number]
    with refused(str(path[one])):
        ds.pooled()
    with refused(str(path[one])):
        list(ds.in_storage_order())


@pytest.mark.parametrize("what", ["offsets", "digests", "status"])
def test_a_shard_that_says_otherwise_of_a_record_is_refused(own, refused, what):
    ds = own()
    row = ds.records.set_index("id").loc["p1"]
    path = ds.store / "shards" / row["shard"][:2] / f"{row['shard']}.safetensors"
    tensor = Shard(path).tensors[what]
    with open(path, "r+b") as file:
        file.seek(tensor.start + tensor.nbytes // tensor.shape[0] * int(row["sequence_no"]))
        file.write(b"\x03")
    with refused(str(path), "does not hold what the index"):
        ds["p1"]
    if what != "offsets":
        with refused(str(path), "does not hold what the index"):
            ds[["p1"]].pooled()


def test_a_shard_whose_layers_changed_places_is_refused(own, refused):
    """Nothing overlaps, everything has its size."""
    ds = own()
    path = ds.store / "shards" / (name := ds.records.set_index("id").loc["p1", "shard"])[:2] / f"{name}.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["layer_0"], header["layer_2"] = header["layer_2"], header["layer_0"]
    path.write_bytes(
        content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length :]
    )
    with refused(str(path), "does not hold what the index"):
        ds["p1"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights_sha256", "0" * 64), ("embed_dim", 16), ("storage_dtype", "float32"), ("layers", [0, 1])],
)
def test_shards_of_other_settings_are_refused(own, refused, key, value):
    path = own().path / "manifest.json"
    manifest = read_json(path)
    manifest["settings"][key] = value
    manifest["settings"]["fingerprint"] = fingerprint(manifest["settings"])
    write_json(path, manifest)
    with refused("does not hold what the index"):
        own()["p1"]


@pytest.mark.parametrize("key", ["layers", "storage_dtype", "outputs", "fingerprint", "embed_dim"])
def test_a_damaged_manifest_is_one_line(own, refused, key):
    path = own().path / "manifest.json"
    manifest = read_json(path)
    del manifest["settings"][key]
    write_json(path, manifest)
    with refused("manifest.json: damaged"):
        own()


@pytest.mark.parametrize(
    "wrong",
    [
        {"schema": "x"},
        {"schema": None},
        {"shards": []},
        {"accepted": "7"},
        {"accepted": -1},
        {"settings": []},
        {"jobs": [5]},
    ],
    ids=str,
)
def test_a_manifest_of_other_types_is_one_line(own, refused, wrong):
    path = own().path / "manifest.json"
    write_json(path, read_json(path) | wrong)
    with refused("manifest.json: damaged", next(iter(wrong))):
        own()


def test_a_dataset_of_a_newer_schema_is_one_line(own, refused):
    path = own().path / "manifest.json"
    write_json(path, {**read_json(path), "schema": 99})
    with refused("newer Lengthwise", "schema 99"):
        own()


def test_an_index_that_was_replaced_since_is_noticed(store, own, refused):
    ds, other = own(), own()
    sent = pickle.dumps(ds[2:9])
    path = ds.path / "index.parquet"
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(path).slice(1), path)
    for read in (lambda: ds.records, lambda: ds.where("true")):
        with refused("index.parquet", "open the dataset again"):
            read()
    with refused("index.parquet"):
        pickle.loads(sent)
    assert other["p1"].shape[1] == 32


OUTPUTS = ["index.parquet", "lookup.arrow", "rejected.tsv", "manifest.json"]


@pytest.mark.parametrize("there", range(4))
def test_a_dataset_that_is_being_made_again_says_so_and_advises_to_remove_nothing(own, refused, there):
    """Snakemake removes all outputs; then they come back one after the other, the manifest last."""
    path = own().path
    for name in OUTPUTS[there:]:
        (path / name).unlink()
    with refused(str(path), "is being made again, or was not finished") as caught:
        own()
    assert "remove" not in str(caught.value)


@pytest.mark.parametrize("back", [[], OUTPUTS[:1], OUTPUTS])
def test_a_dataset_that_is_made_again_while_it_is_opened_says_so(own, refused, monkeypatch, back):
    path = own().path
    original = lookup.Index.__init__

    def meanwhile(self, *arguments):
        kept = {name: (path / name).read_bytes() for name in OUTPUTS}
        for name in OUTPUTS:
            (path / name).unlink()
        with pytest.raises(LengthwiseError) as caught:
            original(self, *arguments)
        for name in back:
            (path / name).write_bytes(kept[name])
        raise caught.value

    monkeypatch.setattr(lookup.Index, "__init__", meanwhile)
    with refused(str(path), "is being made again, or was not finished") as caught:
        own()
    assert "remove" not in str(caught.value)


# ---- torch


def batches(data, collate, **options):
    return list(DataLoader(data, batch_size=8, collate_fn=collate, **options))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_give_the_batches_that_one_process_gives(ds, stored, how):
    data = ds.where("length > 0")[::2].torch()
    ds["p1"]  # the parent has shards open
    mine = batches(data, data.pad)
    theirs = batches(data, data.pad, num_workers=2, multiprocessing_context=how)
    assert [batch.ids for batch in mine] == [batch.ids for batch in theirs]
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one.rows, two.rows)
        assert torch.equal(one.mask, two.mask)
    for batch in theirs:
        for name, rows, mask in zip(batch.ids, batch.rows, batch.mask, strict=True):
            np.testing.assert_array_equal(rows[mask].numpy(), stored[name])
            assert not rows[~mask].any()


def test_packed_rows_are_the_proteins_end_to_end(ds, stored):
    data = ds.torch()
    for batch in batches(data, data.pack):
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.rows.dtype == torch.float16
        np.testing.assert_array_equal(batch.rows.numpy(), np.concatenate([stored[name] for name in batch.ids]))
        lengths = batch.cu_seqlens.diff().tolist()
        assert lengths == [len(stored[name]) for name in batch.ids]
        assert (batch.cu_seqlens[0], batch.max_length) == (0, max(lengths))


def test_a_dataset_is_sent_to_workers_in_a_few_bytes(ds):
    list(ds.values())
    assert len(pickle.dumps(ds.torch())) < 600
    assert len(pickle.dumps(ds[5:50])) < 600


def test_collating_needs_no_dataset():
    items = [("a", torch.ones(2, 3)), ("b", torch.ones(1, 3))]
    assert torch_module.TorchDataset.pad(items).mask.tolist() == [[True, True], [True, False]]
    assert torch_module.TorchDataset.pack(items).cu_seqlens.tolist() == [0, 2, 3]


# ---- the rest


def test_opening_and_reading_imports_neither_pandas_nor_torch_nor_duckdb_nor_parquet(store):
    path = store.path / "datasets" / "a"
    code = f"import lengthwise, sys; ds = lengthwise.open({str(path)!r}); ds['p1'], ds[3], ds.pooled(), ds.ids[:3]\n"
    code += "print({'pandas', 'torch', 'duckdb', 'pyarrow.parquet'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=with_scripts()
    )
    assert done.stdout == "set()\n"


def with_scripts() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}


def test_a_dataset_is_read_while_a_run_adds_another_to_the_store(small_store, random_proteins):
    made = small_store()
    first = random_proteins(30)
    made.ingest("first", first)
    made.run(shard_bytes=20_000)
    expected = {name: rows.copy() for name, rows in made.open("first").items()}
    made.ingest("second", {**first, **random_proteins(100, prefix="q", longest=300)})
    jobs = made.plan(shard_bytes=20_000)["job"]
    todo = [job for job in jobs if not job_record_path(made.path, job).exists()]
    arguments = [(str(work_order_path(made.path, job)), str(job_record_path(made.path, job))) for job in todo]
    code = (
        "from pathlib import Path; from lengthwise.jobs.embed_job import embed_job\n"
        f"for work_order, job_record in {arguments!r}: embed_job(Path({str(made.path)!r}), Path(work_order), Path(job_record))"
    )
    before, rounds = len(made.shard_files()), 0
    writer = subprocess.Popen([sys.executable, "-c", code], env=with_scripts())
    while writer.poll() is None or not rounds:
        ds = made.open("first")
        for name, rows in ds.in_storage_order():
            np.testing.assert_array_equal(rows, expected[name])
        np.testing.assert_array_equal(ds["p3"], expected["p3"])
        rounds += len(made.shard_files()) > before
        time.sleep(0.01)
    assert writer.returncode == 0
    made.assemble("second")
    second = made.open("second")
    assert len(second) == 130
    for name, rows in expected.items():
        np.testing.assert_array_equal(second[name], rows)


@pytest.fixture(scope="module")
def example(small_store, tmp_path_factory):
    """A folder in which results/demo holds the example, embedded by a model of the demo's width."""
    folder = tmp_path_factory.mktemp("example")
    checkpoint.write_random(folder / "wide.pt", ModelConfig(1, 320, 20))
    made = small_store(folder / "wide.pt", folder)
    records = (ROOT / "config/example.fasta").read_text().split(">")[1:]
    made.ingest("example", dict(record.split("\n", 1) for record in records))
    made.run()
    (folder / "results/demo").symlink_to("tiny")
    return folder


@pytest.mark.parametrize(
    "module", [lengthwise, dataset, embeddings, read_store, torch_module, lookup], ids=lambda module: module.__name__
)
def test_the_examples_in_the_docstrings_run(example, monkeypatch, module):
    monkeypatch.chdir(example)
    monkeypatch.setenv("XDG_CACHE_HOME", str(example / "cache"))
    result = doctest.testmod(module, extraglobs={"lengthwise": lengthwise}, verbose=False)
    assert result.failed == 0
    assert result.attempted or module in (torch_module, lookup)
