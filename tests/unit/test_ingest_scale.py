"""How fast and how large: ingest beside Biopython's parser on one core; ingest and plan of ten million records.

Run all of it with ``-m slow``, and with TMPDIR on a disk with 30 GB.
"""

import multiprocessing
import os
import resource
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser

from lengthwise.ingest import ingest
from lengthwise.plan import MAX_JOBS, Sizes, plan
from realistic import write, write_sequences


def in_its_own_process(function, *arguments):
    """What a function returns in a fresh process, and the most memory that process had, in MiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_with_peak, function, *arguments).result()


def _with_peak(function, *arguments):
    return function(*arguments), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def times_of_parser_and_ingest(fasta, folder, rounds: int) -> tuple[float, float]:
    """The least seconds of several interleaved rounds on one core; nothing of ingest is left out."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    parser, ours = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        with open(fasta) as file:
            n = sum(1 for _ in SimpleFastaParser(file))
        parser.append(time.perf_counter() - begin)
        for path in folder.glob("*"):
            path.unlink()
        begin = time.perf_counter()
        summary = ingest(fasta, *(folder / name for name in ("records.parquet", "sequences.parquet", "summary.json")))
        ours.append(time.perf_counter() - begin)
        assert summary["records"] == n
    return min(parser), min(ours)


@pytest.mark.parametrize(
    # The small file, read in a sixth of a second, is for gross losses alone: others may be at work on the machine.
    ("records", "rounds", "limit"),
    [pytest.param(100_000, 5, 5.0, id="100k"), pytest.param(10**6, 7, 2.5, id="1M", marks=pytest.mark.slow)],
)
def test_ingest_takes_a_small_multiple_of_biopythons_parser_on_one_core(records, rounds, limit, tmp_path):
    write(tmp_path / "in.fasta", records)
    (parser, ours), _ = in_its_own_process(times_of_parser_and_ingest, tmp_path / "in.fasta", tmp_path / "out", rounds)
    warnings.warn(
        f"{records:,} records: parser {parser:.2f} s, ingest {ours:.2f} s, {ours / parser:.2f} times", stacklevel=1
    )
    assert ours / parser < limit


def counts_and_seconds_of_ingest(fasta, folder, memory_bytes: int) -> tuple[dict, float]:
    begin = time.perf_counter()
    paths = [folder / name for name in ("records.parquet", "sequences.parquet", "summary.json")]
    return ingest(fasta, *paths, memory_bytes=memory_bytes), time.perf_counter() - begin


def jobs_and_seconds_of_plan(store, sequences, memory_bytes: int) -> tuple[pd.DataFrame, float]:
    begin = time.perf_counter()
    jobs = plan(store, {"a": sequences}, Sizes(1200, 1 << 26), store / "plan" / "jobs.tsv", memory_bytes)
    return jobs, time.perf_counter() - begin


@pytest.mark.slow
def test_ten_million_records_take_five_minutes_and_two_gibibytes_and_ten_times_what_a_million_takes(
    small_store, tmp_path
):
    seconds, memory_bytes = {}, 800 * 10**6  # as the workflow gives of its 2 GB
    for records in (10**6, 10**7):
        fasta, store = tmp_path / f"{records}.fasta", small_store(folder=tmp_path / f"{records}").path
        expected = write(fasta, records)
        folder = store / "inputs" / "a"
        (counts, ingest_s), ingest_peak = in_its_own_process(counts_and_seconds_of_ingest, fasta, folder, memory_bytes)
        assert {key: counts[key] for key in expected} == expected
        (jobs, plan_s), plan_peak = in_its_own_process(
            jobs_and_seconds_of_plan, store, folder / "sequences.parquet", memory_bytes
        )
        assert jobs["sequences"].sum() == expected["accepted"]
        assert len(jobs) <= MAX_JOBS
        assert max(ingest_peak, plan_peak) < 2048
        seconds[records] = ingest_s + plan_s
        warnings.warn(
            f"{records:,} records: ingest {ingest_s:.0f} s, {ingest_peak} MiB; plan {plan_s:.0f} s, {plan_peak} MiB",
            stacklevel=1,
        )
        fasta.unlink()
    assert seconds[10**7] < 300
    assert seconds[10**7] < 15 * seconds[10**6]


@pytest.mark.slow
def test_a_hundred_million_short_sequences_are_planned_in_four_gibibytes_twice(small_store, tmp_path):
    """New work, and then all of it in specs; a tenth of it takes a tenth of the time."""
    seconds, memory_bytes = {}, 1600 * 10**6  # as the workflow gives of 4 GB
    for n in (10**7, 10**8):
        store, sequences = small_store(folder=tmp_path / f"{n}").path, tmp_path / "sequences.parquet"
        write_sequences(sequences, n)
        tables = []
        for time_of in ("new", "again"):
            (jobs, took), peak = in_its_own_process(jobs_and_seconds_of_plan, store, sequences, memory_bytes)
            warnings.warn(f"{n:,} sequences, {time_of}: plan {took:.0f} s, {peak} MiB", stacklevel=1)
            assert jobs["sequences"].sum() == n
            assert peak < 4096
            seconds[n, time_of] = took
            tables.append(jobs)
        assert tables[0].equals(tables[1])
        sequences.unlink()
        shutil.rmtree(store)
    for time_of in ("new", "again"):
        assert seconds[10**8, time_of] < 15 * seconds[10**7, time_of]
