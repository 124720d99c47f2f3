"""Sequences put into order part by part, against DuckDB's ORDER BY of all of them."""

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lengthwise.ingest.tables import SEQUENCES
from lengthwise.plan.external_sort import SortedSequences


@pytest.fixture
def files(tmp_path):
    """Three files of random sequences; the later two repeat some of the first, and one is empty."""
    rng = np.random.default_rng(3)
    made = [
        {"digest": rng.bytes(24), "length": length, "sequence": b"M" * length}
        for length in [*rng.integers(1, 40, 3000).tolist(), *[50] * 3000, 20_000]
    ]
    paths = []
    for number, rows in enumerate([made[:4000], [*made[500:700], *made[4000:]], [*made[:50], *made[4500:5000]], []]):
        paths.append(tmp_path / f"{number}.parquet")
        order = rng.permutation(len(rows))
        pq.write_table(pa.Table.from_pylist([rows[i] for i in order], SEQUENCES), paths[-1])
    return paths


def expected(paths, chosen) -> pa.Table:
    database = duckdb.connect()
    for number, (path, own) in enumerate(zip(paths, chosen, strict=True)):
        database.register(f"rows{number}", pq.read_table(path).filter(pa.array(own)))
    union = " UNION ALL ".join(f"SELECT *, {number} AS source FROM rows{number}" for number in range(len(paths)))
    return database.sql(
        f"SELECT *, row_number() OVER (PARTITION BY digest ORDER BY source) > 1 AS repeats FROM ({union})"
        " ORDER BY length, digest, source"
    ).to_arrow_table()


@pytest.mark.parametrize("part_bytes", [1, 1000, 50_000, 1 << 30])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_parts_give_the_order_that_duckdb_gives_the_whole(files, tmp_path, monkeypatch, part_bytes, share):
    monkeypatch.setattr("lengthwise.plan.external_sort._BATCH_ROWS", 700)
    rng = np.random.default_rng(5)
    chosen = [rng.random(pq.read_metadata(path).num_rows) < share for path in files]
    (tmp_path / "scratch").mkdir()
    ordered = SortedSequences(files, chosen, tmp_path / "scratch", part_bytes)
    tables = list(ordered.tables())
    found = [row for table in tables for row in table.to_pylist()]
    wanted = expected(files, chosen).to_pylist()
    assert found == wanted
    once = [row["length"] for row in wanted if not row["repeats"]]
    lengths, counts = np.unique(np.array(once, int), return_counts=True)
    assert (ordered.lengths.tolist(), ordered.counts.tolist()) == (lengths.tolist(), counts.tolist())
    if share and part_bytes < 1 << 30:  # one length alone is in several parts
        assert len([table for table in tables if 50 in table.column("length").to_pylist()]) > 1
        assert len(tables) <= 501


def test_one_file_is_counted_without_looking_for_repeats(files, tmp_path):
    table = pq.read_table(files[0])
    ordered = SortedSequences(files[:1], [np.ones(len(table), bool)], tmp_path, 10_000)
    assert ordered.counts.sum() == len(table)
    assert not any(row["repeats"] for part in ordered.tables() for row in part.to_pylist())
