"""Assemble of many records, within little memory."""

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from lengthwise.esm2 import tokens
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.system.files import read_json, write_json

RECORDS, LENGTH = 120_000, 45
PLENTY, LITTLE = 1 << 30, 40 << 20


@pytest.fixture(scope="module")
def made(small_store):
    """A store whose jobs are finished, with zeros for embeddings."""
    store = small_store(outputs=["mean"])
    letters = np.frombuffer(tokens.RESIDUES[:20], np.uint8)
    residues = np.random.default_rng(1).choice(letters, (RECORDS, LENGTH)).tobytes().decode()
    store.ingest(
        "a", {f"tr|A{i:09d}": residues[i * LENGTH : (i + 1) * LENGTH] for i in range(RECORDS)} | {"bad": "M-K"}
    )
    store.plan(job_seconds=1e9)
    for job in store.jobs["job"]:
        work_order = pq.read_table(work_order_path(store.path, job)).to_pandas()
        sizes = {}
        for name, rows in work_order.groupby("shard"):
            n = len(rows)
            with ShardWriter(
                store.path, name, rows["digest"].tolist(), rows["length"].to_numpy(), store.settings
            ) as writer:
                zeros = np.zeros((n, store.settings["embed_dim"]), np.float32)
                writer.write(0, {"mean_2": zeros}, np.zeros(n, np.uint8))
                writer.commit()
            sizes[name] = store.shard_path(name).stat().st_size
        maker = {
            "device": "Abacus",
            "versions": {},
            "precision": "float32",
            "batch_tokens": None,
            "threads": 1,
            "parity": {},
        }
        write_json(job_record_path(store.path, job), maker | {"job": job, "shards": sizes, "made": list(sizes)})
    return store


def test_a_dataset_assembled_within_little_memory_is_the_same(made, monkeypatch, refused):
    """By way of the disk, in the order of the records; what is spilled is gone afterwards."""
    folder, found = made.path / "datasets" / "a", []
    for memory_bytes in (PLENTY, LITTLE):
        made.assemble("a", memory_bytes=memory_bytes)
        manifest = read_json(folder / "manifest.json")
        del manifest["files"]["README.md"]  # it has the time of making too
        found.append((pq.read_table(folder / "index.parquet"), manifest | {"created": None}))
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    (index, manifest), within_little = found
    assert within_little[0].equals(index)
    assert within_little[1] == manifest
    assert (manifest["accepted"], manifest["rejected"]) == (RECORDS, 1)
    assert (np.diff(index["record_no"].to_numpy()) == 1).all()
    connect = duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda config: connect(config=config | {"temp_directory": ""}))
    with refused(f"assemble ran out of its {LITTLE:,} bytes of memory", "--set-resources assemble:mem_mb="):
        made.assemble("a", memory_bytes=LITTLE)  # so it was by the disk


def test_a_damaged_table_of_records_is_not_assembled(made, refused):
    """A flipped byte may be another id."""
    path = made.inputs("a") / "records.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    try:
        with refused(str(path), "damaged", "remove it and run snakemake again"):
            made.assemble("a")
    finally:
        path.write_bytes(content)
