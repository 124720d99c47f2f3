"""The plan: the same inputs give the same jobs, more inputs give more jobs, and no sequence is embedded twice."""

import hashlib
import os
import shutil
from itertools import pairwise

import duckdb
import numpy as np
import pytest

from lengthwise.esm2.costs import forecast_seconds
from lengthwise.ingest.tables import SEQUENCES
from lengthwise.plan.cuts import Sizes, cut_runs
from lengthwise.plan.external_sort import SortedSequences
from lengthwise.plan.planner import JOBS_COLUMNS, plan, read_jobs
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.store.settings import shape_of
from lengthwise.store.shard import Shard
from lengthwise.store.sizes import bytes_per_sequence
from realistic import write_sequences

# A sequence of 40 residues is forecast to take 40 microseconds with the tiny model, and 2.7 kB in float16.
SMALL_JOBS = {"job_seconds": 4e-4, "shard_bytes": 8_000}


def snapshot(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards_of(store, jobs) -> dict[str, list[dict]]:
    """{shard: its rows in the work orders of these jobs}."""
    shards: dict[str, list[dict]] = {}
    for job in jobs:
        for row in store.work_order(job).to_dict("records"):
            shards.setdefault(row["shard"], []).append(row)
    return shards


def wanted(store, *datasets) -> set[bytes]:
    tables = [str(store.inputs(name) / "sequences.parquet") for name in datasets or store.datasets]
    return {bytes(digest) for (digest,) in duckdb.execute("SELECT digest FROM read_parquet(?)", [tables]).fetchall()}


def planned(store, jobs=None) -> list[bytes]:
    jobs = store.jobs["job"] if jobs is None else jobs
    return [bytes(row["digest"]) for rows in shards_of(store, jobs).values() for row in rows]


@pytest.fixture
def store(small_store, random_proteins):
    """A store with dataset a of 60 proteins ingested."""
    made = small_store()
    made.ingest("a", random_proteins(60))
    return made


@pytest.fixture
def half_done(small_store, random_proteins):
    """A store whose one job of four or more shards was killed after two of them."""
    made = small_store()
    made.ingest("a", random_proteins(40))
    made.plan(shard_bytes=8_000)
    (job,) = made.jobs["job"]
    job_record = made.embed(job)
    job_record_path(made.path, job).unlink()
    for shard in list(job_record["shards"])[2:]:
        made.shard_path(shard).unlink()
    assert len(made.shard_files()) == 2 < len(job_record["shards"])
    return made


def finished_digests(store) -> list[bytes]:
    return [digest.tobytes() for path in store.shard_files() for digest in Shard(path)["digests"]]


def drop_a_finished_sequence(store, proteins, digest_of) -> None:
    """Ingest dataset a again without one protein that a finished shard holds."""
    finished = finished_digests(store)
    unwanted = next(name for name, sequence in proteins.items() if digest_of(sequence) in finished)
    store.ingest("a", {name: sequence for name, sequence in proteins.items() if name != unwanted})


def test_every_sequence_is_in_the_plan_once_with_what_was_ingested(store, digest_of):
    store.plan(**SMALL_JOBS)
    assert sorted(planned(store)) == sorted(wanted(store))
    for job in store.jobs["job"]:
        for row in store.work_order(job).to_dict("records"):
            assert digest_of(row["sequence"].decode()) == row["digest"]
            assert row["length"] == len(row["sequence"])


def test_the_table_of_jobs_counts_what_the_work_orders_hold(store):
    table = store.plan(**SMALL_JOBS)
    assert len(table) > 3
    for row in table.to_dict("records"):
        counts = duckdb.execute(
            "SELECT count(DISTINCT shard), count(*), sum(length)::BIGINT FROM read_parquet(?)",
            [str(work_order_path(store.path, row["job"]))],
        ).fetchone()
        lengths = store.work_order(row["job"])["length"].to_numpy()
        assert (row["shards"], row["sequences"], row["residues"]) == counts
        assert row["forecast_bytes"] == bytes_per_sequence(lengths, store.settings).sum()
        assert row["forecast_seconds"] == pytest.approx(
            forecast_seconds(lengths, shape_of(store.settings), store.settings["device"]).sum(), abs=1e-3
        )


def test_the_table_reads_back_as_it_was_written(store):
    table = store.plan(**SMALL_JOBS)
    read = read_jobs(store.jobs_tsv)
    assert list(read.columns) == JOBS_COLUMNS
    assert read.to_dict("records") == table.to_dict("records")


def test_planning_again_writes_the_same_bytes(store):
    store.plan(**SMALL_JOBS)
    before = snapshot(store.path / "plan")
    store.plan(**SMALL_JOBS)
    assert snapshot(store.path / "plan") == before


def test_planning_again_after_some_jobs_are_done_writes_the_same_bytes(store):
    store.plan(**SMALL_JOBS)
    before = snapshot(store.path / "plan")
    for job in store.jobs["job"][1:3]:
        store.embed(job)
    store.plan(**SMALL_JOBS)
    assert snapshot(store.path / "plan") == before


def test_the_order_of_the_records_changes_no_job(store, small_store, random_proteins):
    other = small_store()
    other.ingest("a", dict(reversed(random_proteins(60).items())))
    assert other.plan(**SMALL_JOBS).to_dict("records") == store.plan(**SMALL_JOBS).to_dict("records")


def test_a_second_dataset_adds_its_new_sequences_only(store, random_proteins):
    store.plan(**SMALL_JOBS)
    first = store.jobs.to_dict("records")
    shared = dict(list(random_proteins(60).items())[::2])
    store.ingest("b", shared | random_proteins(30, seed=1, prefix="q"))
    store.plan(**SMALL_JOBS)
    assert store.jobs_of("a") == [row["job"] for row in first]
    new = [job for job in store.jobs["job"] if job not in store.jobs_of("a")]
    assert sorted(planned(store, new)) == sorted(wanted(store, "b") - wanted(store, "a"))
    assert set(planned(store, store.jobs_of("b"))) >= wanted(store, "b")
    numbers = ["shards", "sequences", "residues", "forecast_bytes", "forecast_seconds"]
    kept = store.jobs[store.jobs["job"].isin(store.jobs_of("a"))]
    assert kept[["job", *numbers]].to_dict("records") == [{k: row[k] for k in ["job", *numbers]} for row in first]


def test_a_dataset_of_known_sequences_makes_no_job(store, random_proteins):
    store.plan(**SMALL_JOBS)
    work_orders = snapshot(store.path / "plan" / "jobs")
    store.ingest("b", dict(list(random_proteins(60).items())[:10]))
    store.plan(**SMALL_JOBS)
    assert snapshot(store.path / "plan" / "jobs") == work_orders
    assert store.jobs_of("b") != []


def test_other_sizes_cut_new_work_only(store, random_proteins):
    store.plan(**SMALL_JOBS)
    first = store.jobs["job"].tolist()
    store.ingest("b", random_proteins(30, seed=1, prefix="q"))
    store.plan()
    assert store.jobs_of("a") == first
    assert len(store.jobs_of("b")) == 1


def test_an_unfinished_job_with_a_sequence_that_no_dataset_needs_is_ignored(store, random_proteins):
    (ignored,) = store.plan()["job"]
    store.ingest("a", dict(list(random_proteins(60).items())[1:]))
    (job,) = store.plan()["job"]
    assert job != ignored
    assert sorted(planned(store)) == sorted(wanted(store))


def test_after_an_input_that_changed_and_changed_back_no_sequence_is_planned_twice(store, random_proteins):
    before = store.plan(**SMALL_JOBS).to_dict("records")
    store.ingest("a", dict(list(random_proteins(60).items())[1:]))
    store.plan(**SMALL_JOBS)
    store.ingest("a", random_proteins(60))
    store.plan(**SMALL_JOBS)
    assert sorted(planned(store)) == sorted(wanted(store))
    assert len({row["job"] for row in before} & set(store.jobs["job"])) >= len(before) - 1


def test_a_finished_job_counts_though_not_all_its_sequences_are_needed(store, random_proteins):
    store.plan()
    store.embed_all()
    store.ingest("a", dict(list(random_proteins(60).items())[:5]))
    before = store.jobs.to_dict("records")
    assert store.plan().to_dict("records") == before


def test_finished_shards_of_an_ignored_job_are_taken_over(half_done, random_proteins, digest_of):
    finished = {path: path.stat().st_mtime_ns for path in half_done.shard_files()}
    held = set(finished_digests(half_done))
    drop_a_finished_sequence(half_done, random_proteins(40), digest_of)
    half_done.plan(shard_bytes=8_000)
    made = [shard for job_record in half_done.embed_all() for shard in job_record["made"]]
    embedded = [
        row["digest"]
        for shard, rows in shards_of(half_done, half_done.jobs["job"]).items()
        for row in rows
        if shard in made
    ]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert sorted(embedded) == sorted(wanted(half_done) - held)
    assert half_done.assemble("a")["accepted"] == 39


def test_planning_again_after_shards_were_taken_over_writes_the_same_bytes(half_done, random_proteins, digest_of):
    drop_a_finished_sequence(half_done, random_proteins(40), digest_of)
    half_done.plan(shard_bytes=8_000)
    before = snapshot(half_done.path / "plan")
    half_done.plan(shard_bytes=8_000)
    assert snapshot(half_done.path / "plan") == before


def test_a_job_killed_before_its_job_record_is_counted_once_when_it_is_taken_over(store, random_proteins):
    (job,) = store.plan()["job"]
    store.embed(job)
    job_record_path(store.path, job).unlink()
    store.ingest("a", dict(list(random_proteins(60).items())[1:]))
    (row,) = store.plan().to_dict("records")
    assert (row["job"], row["sequences"]) == (job, 60)


def test_shards_of_several_ignored_jobs_are_taken_over_the_same_way_twice(store, random_proteins):
    store.plan(**SMALL_JOBS)
    store.embed_all()
    for job in store.jobs["job"]:
        job_record_path(store.path, job).unlink()
    store.ingest("a", dict(list(random_proteins(60).items())[::2]))
    store.plan(**SMALL_JOBS)
    work_orders = snapshot(store.path / "plan" / "jobs")
    store.plan(**SMALL_JOBS)
    assert snapshot(store.path / "plan" / "jobs") == work_orders


def test_a_shard_holds_no_more_than_shard_bytes_unless_one_sequence_does(store):
    cap = 8_000
    store.ingest("long", {"long": "MKVLAWWCDE" * 30})
    store.plan(shard_bytes=cap)
    sizes = {
        shard: (len(rows), bytes_per_sequence(np.array([row["length"] for row in rows]), store.settings).sum())
        for shard, rows in shards_of(store, store.jobs["job"]).items()
    }
    assert {n > 1 for n, _ in sizes.values()} == {True, False}  # both cases are met
    assert [shard for shard, (n, size) in sizes.items() if n > 1 and size > cap] == []


def test_no_shard_file_is_larger_than_shard_bytes(small_store, random_proteins):
    store, cap = small_store(), 65_536
    store.ingest("a", random_proteins(200))
    store.plan(shard_bytes=cap)
    store.embed_all()
    assert len(store.shard_files()) > 2
    assert max(path.stat().st_size for path in store.shard_files()) <= cap


def test_a_job_takes_no_longer_than_job_seconds(store):
    cap = 4e-4
    store.plan(job_seconds=cap)
    seconds = [
        forecast_seconds(
            store.work_order(job)["length"].to_numpy(), shape_of(store.settings), store.settings["device"]
        ).sum()
        for job in store.jobs["job"]
    ]
    assert len(seconds) > 3
    assert max(seconds) <= cap * (1 + 1e-9)


def test_jobs_grow_rather_than_become_more_than_snakemake_can_look_at(store, monkeypatch):
    assert len(store.plan(**SMALL_JOBS)) > 5
    monkeypatch.setattr("lengthwise.plan.cuts.MAX_JOBS", 3)
    for path in (store.path / "plan" / "jobs").iterdir():
        path.unlink()
    assert 1 < len(store.plan(**SMALL_JOBS)) <= 3
    assert sorted(planned(store)) == sorted(wanted(store))


def test_a_job_has_no_more_residues_than_its_work_order_may_hold(store, monkeypatch):
    monkeypatch.setattr("lengthwise.plan.cuts.MAX_WORK_ORDER_BYTES", 500)
    monkeypatch.setattr("lengthwise.plan.cuts.SEQUENCE_OVERHEAD_BYTES", 0)
    table = store.plan(shard_bytes=8_000)
    assert len(table) > 1
    assert table["residues"].max() <= 500


def test_a_plan_within_little_memory_is_the_same(store, tmp_path, monkeypatch, refused):
    """By way of the disk, for new sequences and for existing work orders; the spilled files are removed."""
    files, tables, parts = {"many": tmp_path / "many.parquet"}, [], []
    write_sequences(files["many"], 600_000)
    ordered = SortedSequences._distribute
    monkeypatch.setattr(SortedSequences, "_distribute", lambda *given: parts.append(ordered(*given)) or parts[-1])

    def planned_within(memory_bytes) -> dict:
        table = plan(store.path, files, Sizes(1.0, 1 << 26), store.jobs_tsv, memory_bytes)
        assert sorted(path.name for path in (store.path / "plan").iterdir()) == ["inputs.json", "jobs", "jobs.tsv"]
        return table.to_dict("records")

    for memory_bytes in (1 << 30, 52 << 20):
        shutil.rmtree(store.path / "plan", ignore_errors=True)
        tables += [planned_within(memory_bytes), planned_within(memory_bytes)]
    assert len(tables[0]) > 10
    assert tables[0] == tables[1] == tables[2] == tables[3]
    assert [len(paths) for paths in parts] == [1, 0, 8, 0]
    connect = duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda config: connect(config=config | {"temp_directory": ""}))
    with refused(
        "plan ran out of its 54,525,952 bytes of memory", "--set-resources plan:mem_mb="
    ):  # so it was by the disk
        planned_within(52 << 20)


def test_sequences_that_several_new_datasets_share_are_planned_once_for_all_of_them(small_store, random_proteins):
    store, proteins = small_store(), list(random_proteins(90).items())
    parts = {"c": proteins[:60], "a": proteins[20:80], "b": proteins[10:30] + proteins[70:]}
    for name, own in parts.items():
        store.ingest(name, dict(own))
    store.plan(**SMALL_JOBS)
    assert len(store.jobs) > 3
    assert sorted(planned(store)) == sorted(wanted(store))
    for name in parts:
        held = [set(store.work_order(job)["digest"]) for job in store.jobs["job"]]
        stands_on = [job for job, digests in zip(store.jobs["job"], held, strict=True) if digests & wanted(store, name)]
        assert store.jobs_of(name) == stands_on


def test_the_work_is_cut_from_sequences_sorted_by_length(store):
    store.plan(**SMALL_JOBS)
    ranges = []
    for job in store.jobs["job"]:
        work_order = store.work_order(job)
        order = list(zip(work_order["length"], work_order["digest"], strict=True))
        assert order == sorted(order)
        ranges.append((order[0], order[-1]))
    ranges.sort()
    assert all(last < first for (_, last), (first, _) in pairwise(ranges))


def test_a_row_starts_where_the_rows_before_it_in_its_shard_end(store):
    store.plan(**SMALL_JOBS)
    for rows in shards_of(store, store.jobs["job"]).values():
        assert [row["row_start"] for row in rows] == [sum(r["length"] for r in rows[:i]) for i in range(len(rows))]


def test_a_shard_is_named_by_the_settings_and_its_sequences(store):
    store.plan(**SMALL_JOBS)
    store.embed_all()
    for shard, rows in shards_of(store, store.jobs["job"]).items():
        content = store.settings["fingerprint"].encode() + b"".join(row["digest"] for row in rows)
        assert shard == hashlib.sha256(content).hexdigest()[:32]
        assert (store.path / "shards" / shard[:2] / f"{shard}.safetensors").is_file()


def test_a_store_may_lie_in_a_folder_of_any_name(small_store, random_proteins, tmp_path):
    store = small_store(folder=tmp_path / "it's [a] store*, größer?")
    store.ingest("a", random_proteins(10))
    store.run()
    assert store.open("a").verify() == 10


def test_a_dataset_without_an_accepted_record_needs_no_job(small_store):
    store = small_store()
    store.ingest("a", {"x": "M-K"})
    store.run()
    assert store.jobs.to_dict("records") == []
    assert store.open("a").manifest["rejected"] == 1


def test_the_sequences_of_a_dataset_have_the_columns_that_plan_reads(store):
    described = duckdb.sql(f"DESCRIBE FROM '{store.inputs('a') / 'sequences.parquet'}'").fetchall()
    assert [name for name, *_ in described] == SEQUENCES.names


@pytest.mark.parametrize("seed", range(20))
def test_cuts_are_as_long_as_the_cap_allows_and_no_longer(seed):
    rng = np.random.default_rng(seed)
    costs, cap = rng.exponential(size=rng.integers(1, 300)), rng.uniform(0.5, 10)
    bounds = cut_runs(costs, cap)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert (np.diff(bounds) > 0).all()
    rounding = 1e-9 * costs.sum()  # of the running sum
    for start, stop in pairwise(bounds):
        assert stop - start == 1 or costs[start:stop].sum() <= cap + rounding
        assert stop == len(costs) or costs[start : stop + 1].sum() > cap - rounding


@pytest.mark.parametrize(
    ("costs", "cap", "bounds"),
    [
        ([], 1, [0]),
        ([5], 1, [0, 1]),
        ([5, 5, 1], 1, [0, 1, 2, 3]),
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([0.1] * 10, 1.0, [0, 10]),
        ([1, 9, 1, 1], 3, [0, 1, 2, 4]),
    ],
    ids=str,
)
def test_cuts_by_hand(costs, cap, bounds):
    assert cut_runs(np.array(costs, float), cap).tolist() == bounds


def test_nothing_temporary_is_left(store):
    store.plan(**SMALL_JOBS)
    names = [name for _, _, files in os.walk(store.path) for name in files]
    assert [name for name in names if name.startswith(".")] == []


def test_a_damaged_table_of_sequences_is_not_planned(store, refused):
    path = store.inputs(store.datasets[0]) / "sequences.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    with refused(str(path), "damaged", "remove it and run snakemake again"):
        store.plan()
