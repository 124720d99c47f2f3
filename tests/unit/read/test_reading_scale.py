"""Reading measured: run with -m huge, and with TMPDIR on a disk with 5 GB."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lengthwise
from lengthwise.store.layout import layout
from lengthwise.store.lookup import LOOKUP, write_lookup
from lengthwise.store.paths import shard_path
from lengthwise.store.settings import fingerprint
from lengthwise.system.files import write_json
from realistic import LOG_MEAN, LOG_SIGMA, LONGEST, SHORTEST

SETTINGS = {
    "schema": 1,
    "model": "none",
    "weights_sha256": "0" * 64,
    "layers": [6],
    "precision": "float32",
    "storage_dtype": "float16",
    "outputs": ["residue"],
    "numerics": 1,
    "device": "cpu",
    "num_layers": 6,
    "embed_dim": 320,
    "attention_heads": 20,
    "random_weights": False,
}
SETTINGS["fingerprint"] = fingerprint(SETTINGS)
PER_SHARD = 5_000
KEYS = 10_000


def make(folder: Path, records: int, filled: bool, embed_dim: int = 320) -> Path:
    """A store of this many records with UniProt's lengths; without being filled, its rows are holes in sparse files."""
    rng, settings = np.random.default_rng(records), SETTINGS | {"embed_dim": embed_dim}
    lengths = np.sort(np.clip(np.exp(rng.normal(LOG_MEAN, LOG_SIGMA, records)).astype(np.int32), SHORTEST, LONGEST))
    digests = np.frombuffer(rng.bytes(24 * records), np.uint8).reshape(-1, 24)
    starts, names = np.empty(records, np.int64), []
    for first in range(0, records, PER_SHARD):
        here = slice(first, first + PER_SHARD)
        header, tensors = layout(lengths[here], settings)
        offsets = np.concatenate([[0], np.cumsum(lengths[here], dtype=np.int64)])
        starts[here] = offsets[:-1]
        names.append(rng.bytes(16).hex())
        path = shard_path(folder, names[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(header)
            if filled:
                file.write(rng.bytes(tensors["layer_6"].nbytes))
            for name, array in (("offsets", offsets), ("digests", digests[here])):
                file.seek(tensors[name].start)
                file.write(array.tobytes())
            file.truncate(max(tensor.start + tensor.nbytes for tensor in tensors.values()))
    order = rng.permutation(records)  # a file is not sorted by length
    places = pa.table(
        {
            "record_no": np.arange(records),
            "digest": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(24), records, [None, pa.py_buffer(np.ascontiguousarray(digests[order]))]
            ),
            "length": lengths[order],
            "shard": pa.DictionaryArray.from_arrays((order // PER_SHARD).astype(np.int32), names),
            "sequence_no": (order % PER_SHARD).astype(np.int32),
            "row_start": starts[order],
        }
    )
    rows = duckdb.sql(
        "SELECT record_no, printf('tr|A%010d|A%010d_9ZZZZ', record_no, record_no) AS id, 'Uncharacterized' AS description,"
        " digest, length, 'accepted' AS status, NULL::VARCHAR AS reason, '' AS changes, shard::VARCHAR AS shard,"
        " sequence_no, row_start FROM places ORDER BY record_no"
    ).to_arrow_table()
    del places
    dataset = folder / "datasets" / "a"
    dataset.mkdir(parents=True)
    pq.write_table(rows, dataset / "index.parquet", compression="zstd")
    write_lookup(dataset / "index.parquet", dataset / LOOKUP)
    manifest = {"schema": 1, "model": "none", "random_weights": False, "settings": settings, "jobs": []}
    counts = {"records": records, "accepted": records, "duplicate": 0, "rejected": 0, "shards": dict.fromkeys(names, 1)}
    write_json(dataset / "manifest.json", {**manifest, **counts})
    return dataset


ACCESS = """
import json, resource, sys, time
import numpy as np
def clock(): return time.perf_counter()
began = clock()
import lengthwise
imported = clock()
ds = lengthwise.open(sys.argv[1])
opened = clock()
ds[0][0, 0]
first = clock()
rng = np.random.default_rng(0)
ids = [ds.ids[i] for i in rng.integers(0, len(ds), 10_000).tolist()]
for name in ids: ds[name][0, 0]
rounds = []
for _ in range(3):
    start = clock()
    for name in ids: ds[name][0, 0]
    rounds.append((clock() - start) / len(ids) * 1e6)
start = clock()
for name in ids: name in ds
found = (clock() - start) / len(ids) * 1e6
start = clock()
try: ds["tr|A0000000007|A0000000008_9ZZZZ"]
except KeyError as error: near = str(error)
start, missed = clock(), clock() - start
chosen = len(ds.where("length < 100 AND id LIKE 'tr|%'"))
print(json.dumps({
    "import_ms": (imported - began) * 1e3, "open_ms": (opened - imported) * 1e3, "first_read_ms": (first - opened) * 1e3,
    "id_us": min(rounds), "in_us": found, "missing_s": missed, "where_s": clock() - start,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
}))
"""


@pytest.mark.huge
def test_a_record_is_found_as_fast_among_ten_million_as_among_a_hundred_thousand(tmp_path):
    measured = {}
    for records in (10**5, 10**6, 10**7):
        dataset = make(tmp_path / f"{records}", records, filled=False)
        done = subprocess.run([sys.executable, "-c", ACCESS, str(dataset)], capture_output=True, text=True, check=True)
        measured[records] = json.loads(done.stdout)
        print(records, {key: round(value, 1) for key, value in measured[records].items()}, file=sys.stderr)
    assert measured[10**7]["id_us"] < 200
    assert measured[10**7]["open_ms"] < 200


# As wide as 650M's. An id costs some 15 microseconds whatever the width: as long as 8M's rows of a protein take.
@pytest.mark.huge
def test_ten_thousand_random_proteins_are_read_about_as_fast_as_with_memmap_alone(tmp_path):
    ds = lengthwise.open(make(tmp_path, KEYS // 4, filled=True, embed_dim=1280))
    frame = ds.records.sample(KEYS, replace=True, random_state=0)
    maps = {}
    for name in frame["shard"].unique():
        tensor = layout_of(ds, name)
        maps[name] = np.memmap(shard_path(ds.store, name), "float16", "r", tensor.start, tensor.shape)
    places = list(zip(frame["shard"], frame["row_start"].astype(int), frame["length"].astype(int), strict=True))

    def with_memmap():
        return sum(np.array(maps[shard][start : start + length]).nbytes for shard, start, length in places)

    def with_lengthwise():
        return sum(np.array(ds[name]).nbytes for name in frame["id"])

    assert with_memmap() == with_lengthwise()
    ratios = []
    for _ in range(7):
        began = time.perf_counter()
        with_memmap()
        middle = time.perf_counter()
        with_lengthwise()
        ratios.append((time.perf_counter() - middle) / (middle - began))
        print(f"memmap {(middle - began) / KEYS * 1e6:.1f} us each, ratio {ratios[-1]:.2f}", file=sys.stderr)
    assert statistics.median(ratios) < 1.3


def layout_of(ds, name):
    from lengthwise.store.shard import Shard

    return Shard(shard_path(ds.store, name)).tensors["layer_6"]
