"""What the workflow reads of a plan: jobs and job records in plan/jobs.tsv."""

import os

import pytest

from lengthwise.plan.jobs_table import job_rows, planned_job_records


@pytest.fixture
def store(tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan/jobs.tsv").write_text("job\tdatasets\tmem_mb\nb\tone,two\t100\na\ttwo\t200\nc\tone.two\t300\n")
    return str(tmp_path)


def test_each_job_has_its_row(store):
    rows = job_rows(f"{store}/plan/jobs.tsv")
    assert list(rows) == ["b", "a", "c"]
    assert rows["a"]["mem_mb"] == "200"


@pytest.mark.parametrize(
    ("dataset", "jobs"), [(None, "bac"), ("one", "b"), ("two", "ba"), ("one.two", "c"), ("none", "")]
)
def test_a_dataset_needs_the_records_of_its_jobs_in_the_order_of_the_table(store, dataset, jobs):
    assert planned_job_records(store, dataset) == [f"{store}/jobs/{job}.json" for job in jobs]


def test_a_changed_table_is_read_again(store):
    path = f"{store}/plan/jobs.tsv"
    before = os.stat(path)
    assert planned_job_records(store, "two")
    with open(path, "w") as table:
        table.write("job\tdatasets\tmem_mb\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the size differs
    assert planned_job_records(store, "two") == []
