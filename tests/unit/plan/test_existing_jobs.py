"""What a plan makes of the work that is there: orders of the last plan stay, finished shards count, damage is made good."""

import json
import shutil
from contextlib import suppress

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lengthwise.errors import LengthwiseError
from lengthwise.maintain.verify import verify
from lengthwise.plan import existing_jobs, planner
from lengthwise.plan.record import plan_record_path
from lengthwise.plan.work_orders import WORK_ORDER, is_intact
from lengthwise.store.paths import job_record_path, work_order_path
from lengthwise.store.shard import Shard
from lengthwise.store.shard_writer import ShardWriter
from lengthwise.system.files import read_json, write_json

JOBS = {"job_seconds": 4e-4, "shard_bytes": 8_000}  # several jobs of several shards
OTHER_JOBS = {"job_seconds": 3e-4, "shard_bytes": 5_000}


@pytest.fixture
def store(small_store, random_proteins):
    """A store with 60 proteins planned."""
    made = small_store()
    made.ingest("a", random_proteins(60))
    made.plan(**JOBS)
    return made


@pytest.fixture(scope="module")
def undisturbed(small_store, random_proteins):
    """The rows of these proteins."""
    made = small_store()
    made.ingest("a", random_proteins(60))
    made.run(**JOBS)
    return made.rows()


def work_orders(store) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (store.path / "plan" / "jobs").iterdir()}


def planned(store) -> list[bytes]:
    return sorted(digest for job in store.jobs["job"] for digest in store.work_order(job)["digest"])


def wanted(store) -> list[bytes]:
    return sorted(pd.read_parquet(store.inputs("a") / "sequences.parquet")["digest"])


def finish(store, *jobs) -> dict[str, int]:
    """Embed these jobs as if they were killed before their job records; returns the time of each shard."""
    for job in jobs:
        store.embed(job)
        job_record_path(store.path, job).unlink()
    return {path.stem: path.stat().st_mtime_ns for path in store.shard_files()}


def listed(store) -> list[str]:
    """The shards in job records, as often as they are there."""
    return [shard for path in store.path.glob("jobs/*.json") for shard in json.loads(path.read_text())["shards"]]


def is_good(store) -> bool:
    return not any(result.problems for result in verify(store.path))


@pytest.fixture
def rivals(store) -> dict[str, bytes]:
    """Work orders of the same sequences that are not of the last plan, as a killed plan leaves them."""
    last = {path: path.read_bytes() for path in (store.path / "plan").rglob("*.*")}
    shutil.rmtree(store.path / "plan")
    store.plan(**OTHER_JOBS)
    made = work_orders(store)
    for path, content in last.items():
        path.write_bytes(content)
    rivals = {job: content for job, content in made.items() if job not in map(lambda p: p.stem, last)}
    assert len(rivals) > 5
    return rivals


def test_work_orders_that_the_last_plan_does_not_name_are_removed(store, rivals):
    last = {job: content for job, content in work_orders(store).items() if job not in rivals}
    table = store.jobs_tsv.read_bytes()
    store.plan(**OTHER_JOBS)
    assert store.jobs_tsv.read_bytes() == table
    assert work_orders(store) == last


def test_a_plan_that_was_killed_before_its_table_changes_nothing(store, random_proteins, monkeypatch):
    before, table = work_orders(store), store.jobs_tsv.read_bytes()
    finished = finish(store, *store.jobs["job"][:2])
    store.ingest("a", dict(list(random_proteins(60).items())[::2]))
    with monkeypatch.context() as patch:
        patch.setattr(planner, "job_requests", None)
        with pytest.raises(TypeError):
            store.plan(**JOBS)
    assert work_orders(store).keys() > before.keys()
    store.ingest("a", random_proteins(60))
    store.plan(**JOBS)
    assert (work_orders(store), store.jobs_tsv.read_bytes()) == (before, table)
    store.embed_all()
    assert finished.items() <= {path.stem: path.stat().st_mtime_ns for path in store.shard_files()}.items()


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no text": lambda path: path.write_bytes(path.read_bytes().replace(b"a", b"\xff")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_where_the_record_of_the_last_plan_is_lost_its_unfinished_jobs_stay(store, damage):
    before, table = work_orders(store), store.jobs_tsv.read_bytes()
    damage(plan_record_path(store.path))
    store.jobs_tsv.unlink()  # by Snakemake, before its rule runs again
    store.plan(**OTHER_JOBS)
    assert (work_orders(store), store.jobs_tsv.read_bytes()) == (before, table)


def test_where_the_record_of_the_last_plan_is_lost_no_sequence_is_planned_twice(store, rivals):
    plan_record_path(store.path).unlink()
    store.plan(**JOBS)
    assert planned(store) == wanted(store)
    assert work_orders(store).keys() == set(store.jobs["job"])


def test_a_record_that_lacks_a_job_costs_no_finished_shard(store):
    finished = finish(store, store.jobs["job"].iloc[-1])
    record = read_json(plan_record_path(store.path))
    write_json(plan_record_path(store.path), record | {"files": dict(list(record["files"].items())[:3])})
    store.plan(**JOBS)
    made = [shard for job_record in store.embed_all() for shard in job_record["made"]]
    assert not finished.keys() & {*made}
    assert finished.keys() < {*listed(store)}
    assert store.assemble("a")["accepted"] == 60


def test_the_lost_work_order_of_a_finished_job_is_written_again_from_its_shards(small_store, random_proteins):
    """Without residues: to make a shard again, they are taken from the inputs."""
    store = small_store()
    store.ingest("a", random_proteins(60))
    (job,) = store.plan(shard_bytes=16_000)["job"]
    store.embed(job)
    table, work_order, rows = store.jobs_tsv.read_bytes(), store.work_order(job), store.rows()
    work_order_path(store.path, job).unlink()
    store.plan()
    assert store.jobs_tsv.read_bytes() == table
    pd.testing.assert_frame_equal(store.work_order(job).assign(sequence=work_order["sequence"]), work_order)
    store.shard_files()[0].unlink()
    job_record_path(store.path, job).unlink()
    assert len(store.embed(job)["made"]) == 1
    assert store.rows() == rows


def test_where_job_records_and_plan_are_lost_nothing_is_embedded_again(store, monkeypatch):
    """Nor where the comparison with fair-esm is lost too: it needs residues, which none of these jobs has."""
    store.embed_all()
    finished = finish(store)
    for folder in ("jobs", "plan", "parity"):
        shutil.rmtree(store.path / folder)
    monkeypatch.setattr(existing_jobs, "MAX_WORK_ORDER_BYTES", 5_000)  # of residues and rows
    assert len(store.plan(**JOBS)) == 3
    assert [job_record["made"] for job_record in store.embed_all()] == [[]] * 3
    assert sorted(listed(store)) == sorted(finished)
    assert store.assemble("a")["accepted"] == 60
    assert is_good(store)


SHARD_DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another's name": lambda path: path.write_bytes(max(path.parent.parent.rglob("*.*")).read_bytes()),
    "another digest": lambda path: flip(path, Shard(path).tensors["digests"].start),
    "other settings": lambda path: flip(path, path.read_bytes().index(b"fingerprint") + 20),
}


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", SHARD_DAMAGES.values(), ids=SHARD_DAMAGES)
def test_a_damaged_shard_of_no_job_is_made_again(store, damage, undisturbed):
    store.embed_all()
    for folder in ("jobs", "plan"):
        shutil.rmtree(store.path / folder)
    damage(store.shard_files()[0])
    store.plan(**JOBS)
    assert sum(len(job_record["made"]) for job_record in store.embed_all()) == 1
    assert store.assemble("a")["accepted"] == 60
    assert store.rows().items() >= undisturbed.items()


@pytest.mark.parametrize("damage", [DAMAGES["emptied"], DAMAGES["halved"], "one byte"])
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_damaged_work_order_is_written_again(store, damage, is_finished):
    job = store.jobs["job"][1]
    if is_finished:
        store.embed(job)
    path, expected = work_order_path(store.path, job), store.work_order(job)
    if damage == "one byte":
        column = (
            pq.read_metadata(path).row_group(0).column(2)
        )  # its page's header may have the digest too, as a statistic
        end = column.data_page_offset + column.total_compressed_size
        flip(path, path.read_bytes().rindex(expected["digest"][0], 0, end))
    else:
        damage(path)
    assert not is_intact(path, store.settings["fingerprint"])
    store.plan(**JOBS)
    assert planned(store) == wanted(store)
    if is_finished:
        pd.testing.assert_frame_equal(store.work_order(job).assign(sequence=None), expected.assign(sequence=None))
    assert all(
        is_intact(work_order_path(store.path, each), store.settings["fingerprint"]) for each in store.jobs["job"]
    )


def test_work_orders_of_other_settings_are_written_anew(store, small_store, random_proteins):
    other = small_store(layers=[1])
    other.ingest("a", random_proteins(60))
    shutil.copytree(store.path / "plan", other.path / "plan")
    other.plan(**JOBS)
    assert not work_orders(other).keys() & work_orders(store).keys()
    assert len(other.embed_all()) == len(other.jobs)


def write_with(path, **columns) -> None:
    """Replace columns of a work order."""
    table = pq.read_table(path)
    for name, values in columns.items():
        i = WORK_ORDER.get_field_index(name)
        table = table.set_column(i, WORK_ORDER.field(i), pa.array(values, WORK_ORDER.field(i).type))
    pq.write_table(table, path)


def test_residues_that_are_not_what_the_digest_says_are_taken_from_the_inputs(store, undisturbed):
    for i, job in enumerate(store.jobs["job"]):
        wrong = store.work_order(job)["sequence"].tolist()
        wrong[0] = [b"A" * len(wrong[0]), wrong[0] + b"A", wrong[0][:-1], None][i % 4]
        write_with(work_order_path(store.path, job), sequence=wrong)
    store.embed_all()
    assert store.rows() == undisturbed


def test_a_job_whose_residues_no_input_has_is_planned_again(store, undisturbed, refused):
    job = store.jobs["job"][0]
    path, inputs = work_order_path(store.path, job), store.inputs("a")
    write_with(path, sequence=[b"A", *store.work_order(job)["sequence"][1:]])
    inputs.rename(store.folder / "a")
    with refused(path.name, "lacks 1 sequence that no input has", "run snakemake again"):
        store.embed(job)
    assert not path.exists()
    (store.folder / "a").rename(inputs)
    store.plan(**JOBS)
    store.embed_all()
    assert store.rows() == undisturbed


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows: {"digest": [bytes(24), *rows["digest"][1:]]},
        lambda rows: {"digest": [None, *rows["digest"][1:]]},
        lambda rows: {"digest": rows["digest"][::-1], "sequence": rows["sequence"][::-1]},
        lambda rows: {"shard": ["0" * 32, *rows["shard"][1:]]},
        lambda rows: {"shard": [*rows["shard"][:-1], None]},
        lambda rows: {"length": [rows["length"][0] + 1, *rows["length"][1:]]},
        lambda rows: {"length": [*rows["length"][:-1], rows["length"].iloc[-1] + 1]},
        lambda rows: {"row_start": rows["row_start"] + 1},
        lambda rows: {name: [] for name in rows},
    ],
)
def test_what_a_damaged_work_order_says_is_never_embedded(store, undisturbed, refused, wrong):
    job = store.jobs["job"][0]
    path = work_order_path(store.path, job)
    if (columns := wrong(store.work_order(job))).keys() == {*WORK_ORDER.names}:
        pq.write_table(WORK_ORDER.empty_table(), path)
    else:
        write_with(path, **columns)
    with refused(path.name, "it is removed", "run snakemake again"):
        store.embed(job)
    assert not path.exists()
    assert store.shard_files() == []
    store.plan(**JOBS)
    store.embed_all()
    assert store.rows() == undisturbed


def test_whatever_byte_of_a_work_order_flips_the_rows_are_right_or_it_is_removed(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(8))
    (job,) = store.plan()["job"]
    store.embed(job)
    path, rows = work_order_path(store.path, job), store.rows()
    content, ends = path.read_bytes(), []
    for at in np.random.default_rng(0).permutation(len(content))[:60].tolist():
        path.write_bytes(content)
        flip(path, at)
        for made in [*store.shard_files(), *store.path.glob("jobs/*")]:
            made.unlink()
        with suppress(LengthwiseError):
            store.embed(job)
            assert store.rows() == rows, at
        is_embedded = job_record_path(store.path, job).exists()
        assert path.exists() == is_embedded
        ends.append(is_embedded)
    assert {*ends} == {True, False}


def test_a_job_that_outlives_its_plan_ends_and_its_finished_shards_count(
    small_store, random_proteins, undisturbed, refused, monkeypatch
):
    """As one on a cluster does whose Snakemake was killed, beside the next run, of which an input has changed."""
    store = small_store()
    store.ingest("a", random_proteins(60))
    (job,) = store.plan(shard_bytes=8_000)["job"]
    commit, finished = ShardWriter.commit, []

    def commit_and_plan(self):
        commit(self)
        finished.append(self.path.stem)
        if len(finished) == 3:
            store.ingest("a", dict(list(random_proteins(60).items())[1:]))
            store.plan(shard_bytes=8_000)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", commit_and_plan)
        with refused(job, "a later plan"):
            store.embed(job, batch_tokens=64)
    assert not job_record_path(store.path, job).exists()
    assert 3 <= len(finished) < 8  # one or two were open
    made = [shard for job_record in store.embed_all() for shard in job_record["made"]]
    assert not {*finished[:3]} & {*made}
    assert {*finished[:3]} < {*listed(store)}
    assert len(listed(store)) == len({*listed(store)})
    assert store.assemble("a")["accepted"] == 59
    assert is_good(store)


@pytest.mark.parametrize("in_manifest", [False, True])
def test_a_job_record_that_comes_after_its_shards_were_taken_over_goes_unless_a_manifest_names_it(store, in_manifest):
    store.embed_all()
    manifest = store.assemble("a")
    late = job_record_path(store.path, "f" * 16)
    late.write_text(job_record_path(store.path, store.jobs["job"][0]).read_text())
    if in_manifest:
        path = store.path / "datasets" / "a" / "manifest.json"
        path.write_text(json.dumps(manifest | {"jobs": [late.stem, *manifest["jobs"][1:]]}))
    table = store.jobs_tsv.read_bytes()
    store.plan(**JOBS)
    assert late.exists() == in_manifest
    if not in_manifest:
        assert store.jobs_tsv.read_bytes() == table
        assert len(listed(store)) == len({*listed(store)})
    assert is_good(store)


def test_a_dataset_is_assembled_without_the_work_orders_of_its_finished_jobs(store):
    store.embed_all()
    index = store.path / "datasets" / "a" / "index.parquet"
    store.assemble("a")
    assembled = index.read_bytes()
    shutil.rmtree(store.path / "plan" / "jobs")
    assert store.assemble("a")["accepted"] == 60
    assert index.read_bytes() == assembled
