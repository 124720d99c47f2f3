"""Ten million records: run with -m slow, and with TMPDIR on a disk with 15 GB."""

import resource
import sys
import time

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser

from lengthwise.ingest import ingest
from lengthwise.plan import Sizes, plan
from realistic import write


@pytest.mark.slow
def test_ingest_and_plan_grow_linearly_to_ten_million_records(small_store, tmp_path):
    seconds = {}
    for records in (10**6, 10**7):
        fasta, store = tmp_path / f"{records}.fasta", small_store(folder=tmp_path / f"{records}")
        expected = write(fasta, records)
        started = time.monotonic()
        paths = [tmp_path / f"{records}" / name for name in ("records.parquet", "sequences.parquet", "summary.json")]
        summary = ingest(fasta, *paths, memory_bytes=800 * 10**6)
        assert {key: summary[key] for key in expected} == expected
        ingested = time.monotonic()
        jobs = plan(store.path, {"a": paths[1]}, Sizes(1200, 1 << 26), store.jobs_tsv, memory_bytes=800 * 10**6)
        assert jobs["sequences"].sum() == expected["accepted"]
        assert len(jobs) <= 5000
        seconds[records] = (ingested - started, time.monotonic() - ingested)
        with open(fasta) as file:
            started = time.monotonic()
            assert sum(1 for _ in SimpleFastaParser(file)) == records
            parser = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{records:,}: ingest, plan {seconds[records]} s, parser {parser:.1f} s, peak {peak} MiB", file=sys.stderr
        )
        fasta.unlink()
    assert sum(seconds[10**7]) < 300
    assert sum(seconds[10**7]) < 15 * sum(seconds[10**6])
