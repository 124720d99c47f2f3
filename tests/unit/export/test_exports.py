"""Exports: what h5py, torch and pyarrow open is what the dataset holds, under names that lose nothing, whole or not at all."""

import csv
import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import google_crc32c
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from lengthwise.export import run, source
from lengthwise.export.h5 import h5_key
from lengthwise.export.pt import file_name
from lengthwise.export.run import export
from lengthwise.maintain.cleanup import leftovers, remove
from lengthwise.store.layout import layout
from lengthwise.store.paths import QUARANTINE_ENDING, shard_path
from lengthwise.store.receipts import RECEIPT, read_receipt, why_exported_again
from lengthwise.store.settings import fingerprint
from lengthwise.store.shard import Shard
from lengthwise.store.sizes import export_bytes
from lengthwise.system.files import read_json, sha256, write_json
from lengthwise.system.locks import exclusive_store_lock

KINDS = ("h5", "pt", "biotrainer", "parquet")
ODD_IDS = [
    "../../etc/passwd",
    "..",
    ".",
    "a/b",
    "a%2Fb",
    "🧬",
    "-rf",
    "NA",
    "na",
    "'\"`;|&",
    "i" * 10_000,
    "%s%n",
    "$(x)",
]


@pytest.fixture(scope="module")
def store(small_store, random_proteins):
    """Two layers and every output of UniProt's ids and odd ones, two duplicates and a rejected record, in many shards."""
    proteins = list(random_proteins(40).values())
    ids = [f"{'sp' if i % 2 else 'tr'}|P{i:05}|NAME_{i}" for i in range(40 - len(ODD_IDS))] + ODD_IDS
    records = dict(zip(ids, proteins, strict=True))
    records["P00001"] = "MKVLAW"  # another id of the same accession, for another sequence
    records["duplicate"] = records["twice"] = records["NA"]
    records["rejected"] = "MK1"
    store = small_store(layers=[1, -1], outputs=["residue", "mean", "bos", "max"], storage_dtype="float32")
    store.ingest("a", records)
    store.run(shard_bytes=20_000)
    assert len(store.shard_files()) > 5
    return store


@pytest.fixture(scope="module")
def exported(store):
    """The dataset's folder with every export, and the dataset as Lengthwise reads it."""
    folder = store.path / "datasets" / "a"
    ds = store.open("a")
    assert {kind: export(folder, kind) for kind in KINDS} == dict.fromkeys(KINDS, len(ds))
    return folder / "exports", ds


def original_ids(file: h5py.File) -> dict[str, str]:
    return {key: entry.attrs["original_id"].replace("\\x00", "\0") for key, entry in file.items()}


def test_h5_has_a_float16_array_for_each_accession_as_uniprot_has(exported):
    folder, ds = exported
    means = dict(zip(ds.ids, ds.pooled("mean"), strict=True))
    with (
        h5py.File(folder / "h5" / "per-residue.h5") as residues,
        h5py.File(folder / "h5" / "per-protein.h5") as proteins,
    ):
        assert residues.keys() == proteins.keys()
        assert residues["P00003"].attrs["original_id"] == "sp|P00003|NAME_3"
        assert sorted(original_ids(residues).values()) == sorted(original_ids(proteins).values()) == sorted(ds.ids)
        for key, record_id in original_ids(residues).items():
            rows, mean = residues[key], proteins[key]
            assert (rows.dtype, mean.dtype) == (np.float16, np.float16)
            assert np.array_equal(rows[:], ds[record_id].astype(np.float16))
            assert np.array_equal(mean[:], means[record_id].astype(np.float16))


def test_h5_keys_give_their_ids_back_and_an_accession_of_two_ids_is_no_key(exported):
    folder, _ = exported
    with h5py.File(folder / "h5" / "per-residue.h5") as file:
        keys = {record_id: key for key, record_id in original_ids(file).items()}
        assert all(isinstance(entry, h5py.Dataset) for entry in file.values())  # no slash made a group
    assert [unquote(keys[record_id]) for record_id in ODD_IDS] == ODD_IDS
    assert keys["sp|P00001|NAME_1"] == "sp|P00001|NAME_1"
    assert keys["P00001"] == "P00001"
    assert keys["tr|P00002|NAME_2"] == "P00002"


@pytest.mark.parametrize("record_id", [*ODD_IDS, "%2F", "/", "%", "a\0b", "sp|only"])
def test_an_h5_key_is_one_name_and_reversible(record_id):
    key = h5_key(record_id)
    assert unquote(key) == record_id
    assert "/" not in key
    assert key != "."


def test_numbers_too_large_for_float16_are_refused_and_named(store, refused, monkeypatch, files_in):
    monkeypatch.setattr(run, "Source", _Doubled)
    folder = store.path / "datasets" / "a"
    before = files_in(folder)
    with refused("tr|P00", "beyond float16's range", "biotrainer"):
        export(folder, "h5")
    assert files_in(folder) == before


class _Doubled(source.Source):
    def proteins(self, *names, **options):
        for protein in super().proteins(*names, **options):
            if protein.id == "tr|P00000|NAME_0":
                protein = source.Protein(protein.id, protein.key, {n: a * 1e6 for n, a in protein.stored.items()})
            yield protein


def test_pt_has_what_extract_py_writes(exported, store):
    """Every tensor is its own storage: views would drag their shard into the file."""
    folder, ds = exported
    with open(folder / "pt" / "files.tsv", newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert sorted(row["id"] for row in rows) == sorted(ds.ids)
    assert {path.name for path in (folder / "pt").iterdir()} == {row["file"] for row in rows} | {"files.tsv", RECEIPT}
    pooled = {(kind, n): ds.layer(n).pooled(kind) for kind in ("mean", "bos") for n in (1, 2)}
    for row in rows:
        loaded = torch.load(folder / "pt" / row["file"], weights_only=True)
        assert list(loaded) == ["label", "representations", "mean_representations", "bos_representations"]
        assert loaded["label"] == row["id"]
        place = ds.ids.index(row["id"])
        for layer in (1, 2):
            rows_of, mean, bos = (loaded[key][layer] for key in list(loaded)[1:])
            assert {t.dtype for t in (rows_of, mean, bos)} == {torch.float32}
            assert np.array_equal(rows_of.numpy(), ds.layer(layer)[row["id"]])
            assert np.array_equal(mean.numpy(), pooled["mean", layer][place])
            assert np.array_equal(bos.numpy(), pooled["bos", layer][place])
            assert rows_of.untyped_storage().nbytes() == rows_of.numel() * 4


def test_pt_files_have_safe_names_that_differ_whatever_the_case(exported):
    folder, _ = exported
    names = [path.name for path in (folder / "pt").iterdir() if path.name != RECEIPT]
    assert "sp|P00003|NAME_3.pt" in names
    assert len({name.lower() for name in names}) == len(names)
    assert all(name[0] not in ".-" and len(name) < 256 and name.isascii() and "/" not in name for name in names)


def test_ids_that_only_case_tells_apart_have_names_of_their_own():
    assert file_name("NA") == "NA.pt"
    assert file_name("NA", {"NA", "na"}) != file_name("na", {"NA", "na"})
    assert file_name("a/b") != file_name("a:b") != file_name("a_b") == "a_b.pt"


def test_biotrainer_finds_every_sequence_by_its_hash_and_others_every_id(exported, store):
    folder, ds = exported
    sequences = {record_id: sequence for record_id, sequence in _records(store) if record_id in ds}
    means = dict(zip(ds.ids, ds.pooled("mean"), strict=True))
    names = ("embeddings_file_tiny.h5", "reduced_embeddings_file_tiny.h5")
    assert {path.name for path in (folder / "biotrainer").iterdir()} == {*names, RECEIPT}
    with (
        h5py.File(folder / "biotrainer" / names[0]) as residues,
        h5py.File(folder / "biotrainer" / names[1]) as reduced,
    ):
        for record_id, sequence in sequences.items():
            # Source: biotrainer 1.4.0, utilities/hashing.py, calculate_sequence_hash.
            key = hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()
            assert np.array_equal(residues[key][:], ds[record_id])
            assert np.array_equal(reduced[key][:], means[record_id])
        assert sorted(original_ids(residues).values()) == sorted(original_ids(reduced).values()) == sorted(ds.ids)
        for key, record_id in original_ids(residues).items():
            assert np.array_equal(residues[key][:], ds[record_id])


def _records(store):
    lines = (store.folder / "a.fasta").read_text().splitlines()
    return zip((line[1:] for line in lines[::2]), lines[1::2], strict=True)


def test_parquet_has_the_pooled_vectors_in_the_order_of_the_input(exported, monkeypatch):
    folder, ds = exported
    table = pq.read_table(folder / "parquet" / "pooled.parquet")
    stored = [f"{kind}_{layer}" for kind in ("mean", "bos", "max") for layer in (2, 1)]
    assert table.column_names == ["id", "digest", "length", *stored]
    assert table.column("id").to_pylist() == ds.ids
    assert str(table.schema.field("mean_2").type) == "fixed_size_list<element: float>[32]"
    assert all(digest.startswith("SQ.") for digest in table.column("digest").to_pylist())
    for name in table.column_names[3:]:
        kind, layer = name.split("_")
        found = table.column(name).combine_chunks().values.to_numpy().reshape(len(ds), -1)
        assert np.array_equal(found, ds.layer(int(layer)).pooled(kind))


def test_pooled_vectors_are_gathered_a_few_at_a_time(exported, store, monkeypatch):
    folder, _ = exported
    before = pq.read_table(folder / "parquet" / "pooled.parquet")
    monkeypatch.setattr(source, "_GATHERED_BYTES", 4096)
    export(store.path / "datasets" / "a", "parquet")
    file = pq.ParquetFile(folder / "parquet" / "pooled.parquet")
    assert file.num_row_groups > 3
    assert file.read().equals(before)


def test_an_export_says_what_made_it(exported, store):
    folder, _ = exported
    with h5py.File(folder / "h5" / "per-residue.h5") as file:
        assert (file.attrs["weights_sha256"], file.attrs["layer"]) == (store.settings["weights_sha256"], 2)
        assert file.attrs["random_weights"]
    assert pq.read_schema(folder / "parquet" / "pooled.parquet").metadata[b"random_weights"] == b"True"


@pytest.fixture(scope="module")
def finished(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(12))
    store.run()
    return store.path


@pytest.fixture
def small(finished, tmp_path):
    """The folder of a dataset of twelve proteins, without exports."""
    shutil.copytree(finished, tmp_path / "store")
    return tmp_path / "store" / "datasets" / "a"


def content(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_fails_leaves_the_old_one_and_nothing_else(small, kind, monkeypatch):
    export(small, kind)
    before = content(small)
    monkeypatch.setattr(run.os, "sync", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(small, kind)
    assert content(small) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(small, kind, refused):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with refused("exports", kind, "cannot be made"):
            export(small, kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((small / "exports").iterdir()) == []


def test_an_export_that_does_not_fit_is_refused_before_it_begins(small, monkeypatch, refused):
    usage = source.shutil.disk_usage(small)._replace(free=30_000)
    monkeypatch.setattr(source.shutil, "disk_usage", lambda _: usage)
    with refused("takes about", "30.0 kB are free"):
        export(small, "pt")


KILLED = """
import os, signal, sys
from pathlib import Path
from lengthwise.export.run import export
os.sync = lambda: os.kill(os.getpid(), signal.SIGKILL)
export(Path(sys.argv[1]), "parquet")
"""


def test_what_a_killed_export_left_is_gone_after_the_next(small):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", KILLED, small], env=environment).returncode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in (small / "exports").iterdir())
    assert content(small / "exports") != {}
    export(small, "parquet")
    assert content(small / "exports").keys() == {Path("parquet/pooled.parquet"), Path("parquet") / RECEIPT}


KILLED_IN_RENAME = """
import os, signal, sys
from pathlib import Path
from lengthwise.export.run import export
calls, original = [], os.rename
def rename(*paths):
    calls.append(paths)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(*paths)
os.rename = rename
export(Path(sys.argv[1]), "pt")
"""


@pytest.mark.parametrize("rename", ["1", "2"])
def test_an_export_that_is_killed_while_it_takes_the_place_of_another_is_never_there_in_part(small, rename):
    export(small, "pt")
    before = content(small / "exports" / "pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED_IN_RENAME, small, rename]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert content(small / "exports" / "pt") == (before if rename == "1" else {})
    for path in leftovers(small.parent.parent):
        remove(path)
    assert {path.name for path in (small / "exports").iterdir()} <= {"pt"}
    export(small, "pt")
    assert content(small / "exports").keys() == {Path("pt") / path for path in before}


def test_a_record_that_is_gone_has_no_file_after_the_next_export(small):
    export(small, "pt")
    (small / "exports" / "pt" / "gone.pt").write_bytes(b"")
    export(small, "pt")
    assert not (small / "exports" / "pt" / "gone.pt").exists()


def test_exports_at_once_end_with_one_whole_export(small):
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(export, [small] * 3, ["h5"] * 3)) == [12] * 3
    names = ("per-residue.h5", "per-protein.h5", RECEIPT)
    assert content(small / "exports").keys() == {Path("h5") / name for name in names}
    with h5py.File(small / "exports" / "h5" / "per-residue.h5") as file:
        assert len(file) == 12


def test_nobody_prunes_while_an_export_is_written(small, monkeypatch, refused):
    tried = []

    def prune_now():
        with refused("at work in this store"), exclusive_store_lock(small.parent.parent):
            pass
        tried.append(True)

    monkeypatch.setattr(run.os, "sync", prune_now)
    export(small, "parquet")
    assert tried


def test_a_missing_shard_is_one_line(small, refused):
    for shard in (small.parent.parent / "shards").rglob("*.safetensors"):
        shard.unlink()
    with refused("shard is missing"):
        export(small, "h5")


@pytest.mark.parametrize("kind", KINDS)
def test_what_reading_refuses_is_not_exported(several, kind, refused):
    """A shard of the same size with other sequences, copied over one."""
    one, other = sorted(several.parent.parent.rglob("*.safetensors"))[:2]
    assert one.stat().st_size == other.stat().st_size
    shutil.copy(other, one)
    with refused(str(one), "does not hold what the index"):
        export(several, kind)


@pytest.mark.parametrize("kind", ["h5", "pt", "biotrainer"])
@pytest.mark.parametrize("tensor", ["layer_2", "mean_2"])
def test_a_flipped_bit_is_not_exported(small, kind, tensor, refused):
    path = next((small.parent.parent / "shards").rglob("*.safetensors"))
    with open(path, "r+b") as file:
        file.seek(Shard(path).tensors[tensor].start)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with refused(str(path), "sequence 0, which is p", "is damaged"):
        export(small, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_index_is_not_exported(small, kind, refused):
    """A bit of an id, which decompresses as well as the right one."""
    path = small / "index.parquet"
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"p11", b"p12", 1))
    assert "p12" in pd.read_parquet(path)["id"].tolist()
    with refused(str(path), "damaged"):
        export(small, kind)
    of_an_earlier_version(small)
    with refused("exports", "cannot be made"):
        export(small, kind)


def of_an_earlier_version(dataset: Path) -> None:
    """Take the checksums of files out of a dataset's records."""
    for path in (dataset / "manifest.json", dataset.parents[1] / "inputs" / dataset.name / "summary.json"):
        record = read_json(path)
        del record["files"]
        path.write_text(json.dumps(record))


def test_damaged_sequences_give_no_keys(small, refused):
    path = small.parents[1] / "inputs" / "a" / "sequences.parquet"
    pq.write_table(pq.read_table(path)[1:], path)
    with refused(str(path), "damaged"):
        export(small, "biotrainer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_receipt_tells_what_an_export_is_and_whether_it_is_whole(small, kind):
    folder, index = small / "exports" / kind, sha256(small / "index.parquet")
    export(small, kind)
    receipt = read_receipt(folder)
    assert (receipt["kind"], receipt["index_sha256"], receipt["entries"]) == (kind, index, 12)
    assert receipt["files"] == {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in folder.iterdir()
        if path.suffix != ".pt" and path.name != RECEIPT
    }
    assert why_exported_again(folder, index) == why_exported_again(folder, None) == ""
    assert "another index" in why_exported_again(folder, "0" * 64)
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        if path.suffix != ".pt":
            assert path.name in why_exported_again(folder, index)
        path.unlink()
        if path.name != RECEIPT:
            assert why_exported_again(folder, index) != ""
        path.write_bytes(content)
    assert why_exported_again(folder, index) == ""


def test_a_pt_export_lists_size_and_checksum_of_each_file(small):
    export(small, "pt")
    folder = small / "exports" / "pt"
    table = pd.read_csv(folder / "files.tsv", sep="\t", dtype={"crc32c": str})
    assert table["bytes"].tolist() == [(folder / name).stat().st_size for name in table["file"]]
    checksums = [f"{google_crc32c.value((folder / name).read_bytes()):08x}" for name in table["file"]]
    assert table["crc32c"].tolist() == checksums
    assert read_receipt(folder)["proteins"] == {"files": 12, "bytes": table["bytes"].sum()}


def test_an_export_without_a_receipt_is_of_an_earlier_version_and_one_in_quarantine_is_made_again(small):
    export(small, "h5")
    folder, index = small / "exports" / "h5", sha256(small / "index.parquet")
    receipt = folder / RECEIPT
    receipt.rename(folder / f"{RECEIPT}{QUARANTINE_ENDING}")
    assert RECEIPT in why_exported_again(folder, index)
    (folder / f"{RECEIPT}{QUARANTINE_ENDING}").unlink()
    assert why_exported_again(folder, index) == "its receipt is missing"
    assert why_exported_again(folder, None) == ""  # neither does the manifest of an earlier version say sizes
    assert why_exported_again(small / "exports" / "pt", index) == ""  # not there at all


def test_whether_an_export_is_whole_is_asked_without_a_library():
    """The question is asked whenever the workflow is parsed."""
    code = "import sys, lengthwise.store.receipts; print({'numpy', 'pyarrow', 'duckdb', 'torch'} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


@pytest.fixture
def several(small_store):
    """The folder of a dataset in shards of one size."""
    store = small_store()
    store.ingest("a", {name: letter * 20 for name, letter in zip("wxyz", "ACDE", strict=True)})
    store.run(shard_bytes=5_000)
    return store.path / "datasets" / "a"


def sparse_dataset(folder, lengths: np.ndarray, d: int):
    """A dataset of one shard whose rows are holes but for the last protein's: as large as one likes, and no larger on disk."""
    settings = {
        "schema": 1,
        "model": "demo",
        "weights_sha256": "0" * 64,
        "layers": [2],
        "precision": "float32",
        "storage_dtype": "float16",
        "outputs": ["residue", "mean"],
        "numerics": 1,
        "device": "cpu",
        "num_layers": 2,
        "embed_dim": d,
        "attention_heads": 2,
        "random_weights": True,
    }
    settings["fingerprint"] = fingerprint(settings)
    name, n = "ab" * 16, len(lengths)
    path, dataset = shard_path(folder, name), folder / "datasets" / "big"
    path.parent.mkdir(parents=True)
    dataset.mkdir(parents=True)
    header, tensors = layout(lengths, settings)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(max(tensor.start + tensor.nbytes for tensor in tensors.values()))
        file.seek(tensors["offsets"].start)
        file.write(offsets.tobytes())
        file.seek(tensors["layer_2"].start + int(offsets[-2]) * d * 2)
        file.write(last_rows(lengths, d).tobytes())
        file.seek(tensors["digests"].start)
        file.write(b"".join(i.to_bytes(24) for i in range(n)))
        file.seek(tensors["crc32c"].start)
        file.write(np.array([checksum(i, lengths, d) for i in range(n)], np.uint32).tobytes())
    records = pd.DataFrame({"record_no": range(n), "id": [f"p{i}" for i in range(n)], "length": lengths})
    records["digest"] = [i.to_bytes(24) for i in range(n)]
    records["status"], records["shard"], records["sequence_no"] = "accepted", name, range(n)
    records["row_start"] = offsets[:-1]
    records.to_parquet(dataset / "index.parquet")
    manifest = {"schema": 1, "dataset": "big", "model": "demo", "random_weights": True, "input_sha256": "0" * 64}
    manifest |= {"records": n, "accepted": n, "duplicate": 0, "rejected": 0, "settings": settings, "jobs": []}
    write_json(dataset / "manifest.json", manifest | {"shards": {name: path.stat().st_size}})
    return dataset


def checksum(number: int, lengths: np.ndarray, d: int) -> int:
    """As the shard's documentation has it: of digest and status, rows, mean."""
    rows = last_rows(lengths, d) if number == len(lengths) - 1 else np.zeros((lengths[number], d), np.float16)
    content = (number.to_bytes(24) + b"\0", rows.tobytes(), np.zeros(d, np.float32).tobytes())
    return functools.reduce(google_crc32c.extend, content, 0)


def last_rows(lengths: np.ndarray, d: int) -> np.ndarray:
    return (np.arange(lengths[-1] * d) % 2_000).astype(np.float16).reshape(-1, d)


def test_rows_beyond_four_gib_of_a_shard_are_exported(tmp_path, monkeypatch):
    """The file has holes; only the last proteins of it are exported."""
    lengths = np.array([35_000] * 25 + [50])
    dataset = sparse_dataset(tmp_path, lengths, 2_560)
    assert Shard(next(tmp_path.rglob("*.safetensors"))).tensors["layer_2"].nbytes > 4 << 30
    index = pd.read_parquet(dataset / "index.parquet")
    index.loc[index.index < 25, "status"] = "rejected"
    index.to_parquet(dataset / "index.parquet")
    assert export(dataset, "h5") == 1
    with h5py.File(dataset / "exports" / "h5" / "per-residue.h5") as file:
        assert np.array_equal(file["p25"][:], last_rows(lengths, 2_560))


@pytest.mark.huge
def test_an_export_of_more_than_four_gib_is_whole_and_streamed(tmp_path):
    lengths = np.array([3_500] * 250 + [50])
    dataset = sparse_dataset(tmp_path, lengths, 2_560)
    before, sizes, done = anonymous_bytes(), [], threading.Event()

    def watch():
        while not done.wait(0.05):
            sizes.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert export(dataset, "h5") == 251
    done.set()
    watcher.join()
    assert max(sizes) - before < 200 << 20
    path = dataset / "exports" / "h5" / "per-residue.h5"
    assert path.stat().st_size > 4 << 30
    with h5py.File(path) as file:
        assert len(file) == 251
        assert file["p249"].shape == (3_500, 2_560)
        assert not file["p249"][-1].any()
        assert np.array_equal(file["p250"][:], last_rows(lengths, 2_560))


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))


def test_pt_has_contacts_as_extract_py_writes_them(small_store, tiny_with_contact_head):
    store = small_store(tiny_with_contact_head, outputs=["mean", "contacts"], contacts_max_residues=30)
    store.ingest("a", {"short": "MKVLAW", "long": "MKVLAW" * 6})
    store.run()
    export(store.path / "datasets" / "a", "pt")
    folder, ds = store.path / "datasets" / "a" / "exports" / "pt", store.open("a")
    short, long = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("short", "long"))
    assert list(short) == ["label", "mean_representations", "contacts"]
    assert np.array_equal(short["contacts"].numpy(), ds.contacts("short"))
    assert short["contacts"].dtype == torch.float32
    assert list(long) == ["label", "mean_representations"]
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert 4 * 6**2 < written <= export_bytes("pt", store.settings, store.path / "datasets" / "a" / "index.parquet")
