"""How fast and how large: ingest beside Biopython's parser on one core; ingest and plan of ten million records.

Run all of it with ``-m huge``, and with TMPDIR on a disk with 30 GB.
"""

import multiprocessing
import os
import re
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser

from lengthwise.ingest.ingest import ingest
from lengthwise.plan.cuts import MAX_JOBS, Sizes
from lengthwise.plan.planner import plan
from realistic import write, write_sequences


def in_its_own_process(function, *arguments):
    """What a function returns in a fresh process, and the most memory that process had, in MiB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_with_peak, function, *arguments).result()


def _with_peak(function, *arguments):
    result, status = function(*arguments), Path("/proc/self/status").read_text()
    return result, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) >> 10  # ru_maxrss begins with the parent's


def times_of_parser_and_ingest(fasta, folder, rounds: int) -> dict[str, tuple[float, float]]:
    """The least (seconds, processor seconds) of interleaved rounds on one core; nothing of ingest is left out."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    paths = [folder / name for name in ("records.parquet", "sequences.parquet", "summary.json")]

    def parse():
        with open(fasta) as file:
            return sum(1 for _ in SimpleFastaParser(file))

    times = {"parser": [], "ingest": []}
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        found = []
        for name, run in [("parser", parse), ("ingest", lambda: ingest(fasta, *paths)["records"])]:
            begin = time.perf_counter(), time.process_time()
            found.append(run())
            times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        assert found[0] == found[1]
    return {name: tuple(np.min(own, axis=0).tolist()) for name, own in times.items()}


@pytest.mark.parametrize(
    ("records", "rounds"),
    [
        pytest.param(100_000, 6, id="100k", marks=pytest.mark.slow),
        pytest.param(10**6, 7, id="1M", marks=pytest.mark.huge),
    ],
)
def test_ingest_takes_at_most_two_and_a_half_times_what_biopythons_parser_takes_on_one_core(records, rounds, tmp_path):
    write(tmp_path / "in.fasta", records)
    times, _ = in_its_own_process(times_of_parser_and_ingest, tmp_path / "in.fasta", tmp_path / "out", rounds)
    ratios = [ours / parser for parser, ours in zip(times["parser"], times["ingest"], strict=True)]
    warnings.warn(
        f"{records:,} records: parser {times['parser'][0]:.2f} s, ingest {times['ingest'][0]:.2f} s: {ratios[0]:.2f} times; "
        f"in processor time {ratios[1]:.2f} times",
        stacklevel=1,
    )
    if records >= 10**6:
        assert ratios[0] < 2.5
    else:  # in a fifth of a second, what is done once for a file counts for more, and so do others at work on the machine
        assert ratios[1] < 3.5


@pytest.mark.parametrize("lines", [b"MK\n", b"\n"], ids=["of-two-letters", "blank"])
def test_a_record_of_a_great_many_lines_takes_a_few_times_its_bytes_of_memory(lines, tmp_path):
    with open(tmp_path / "in.fasta", "wb") as file:
        file.write(b">a\nMK\n" + lines * ((24 << 20) // len(lines)))
    (counts, _), peak = in_its_own_process(counts_and_seconds_of_ingest, tmp_path / "in.fasta", tmp_path, 1 << 28)
    assert counts["accepted"] == 1
    assert peak < 640


def counts_and_seconds_of_ingest(fasta, folder, memory_bytes: int) -> tuple[dict, float]:
    begin = time.perf_counter()
    paths = [folder / name for name in ("records.parquet", "sequences.parquet", "summary.json")]
    return ingest(fasta, *paths, memory_bytes=memory_bytes), time.perf_counter() - begin


def jobs_and_seconds_of_plan(store, sequences, memory_bytes: int) -> tuple[pd.DataFrame, float]:
    begin = time.perf_counter()
    jobs = plan(store, {"a": sequences}, Sizes(1200, 1 << 26), store / "plan" / "jobs.tsv", memory_bytes)
    return jobs, time.perf_counter() - begin


@pytest.mark.huge
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


@pytest.mark.huge
def test_a_hundred_million_short_sequences_are_planned_in_four_gibibytes_twice(small_store, tmp_path):
    """New work, and then all of it in work orders; a tenth of it takes a tenth of the time."""
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
