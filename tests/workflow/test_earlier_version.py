"""A store that the version before the rooms made (commit 0e749b6) opens, verifies and is extended; nothing is made again.

The archive is a user's folder with the times of its files: a tiny model with random weights, datasets a and b, two exports.
That version ran `snakemake` in it for the manifests and exports, so there is no report yet.
"""

import json
import os
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from project import Project
from safetensors.numpy import load_file

import lengthwise
from lengthwise.__main__ import main
from lengthwise.ingest.identity import TABLES, adopt, input_stamp, read_summary, why_read_again
from lengthwise.plan.record import is_adoptable

ARCHIVE = Path(__file__).parent / "data" / "store_of_0e749b6.tar.gz"


@pytest.fixture
def project(tmp_path) -> Project:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "project", filter="data")
    return Project(tmp_path / "project")


def contents_and_times(project: Project) -> dict[Path, tuple[bytes, int]]:
    """Of the files that an unchanged dataset stands on."""
    patterns = ("shards/*/*", "metrics/*/*", "jobs/*", "plan/jobs/*", "datasets/**/*", "settings.json")
    paths = (path for pattern in patterns for path in project.store.glob(pattern) if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_dataset_reads_as_the_file_says_and_verifies(project, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM WEIGHTS")
        ds = lengthwise.open(project.store / "datasets" / "a")
    (path,) = project.store.glob("shards/*/*.safetensors")
    shard = load_file(path)
    index = pd.read_parquet(project.store / "datasets" / "a" / "index.parquet")
    assert list(ds.ids) == index["id"].tolist() == [f"a_{i}" for i in range(6)]
    for record in index.itertuples():
        rows = slice(record.row_start, record.row_start + record.length)
        np.testing.assert_array_equal(ds[record.id], shard["layer_2"][rows])
        np.testing.assert_array_equal(ds.layer(0)[record.id], shard["layer_0"][rows])
    np.testing.assert_array_equal(ds.pooled("mean"), shard["mean_2"][index["sequence_no"]])
    np.testing.assert_array_equal(ds.pooled("bos"), shard["bos_2"][index["sequence_no"]])
    assert main(["verify", str(project.store)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "weights: good",
        "dataset a: good, 6 records",
        "dataset b: good, 3 records",
    ]


@pytest.mark.parametrize("damage", [0, 80, 110])
def test_a_plan_that_is_cut_short_is_made_again(project, damage):
    assert is_adoptable(project.store, ["a", "b"])
    os.truncate(project.store / "plan/jobs.tsv", damage)  # 110: after the first line
    assert not is_adoptable(project.store, ["a", "b"])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("damage", ["emptied", "halved"])
def test_a_table_that_is_cut_short_is_made_again(project, table, damage):
    folder, fasta = project.store / "inputs/a", [input_stamp(project.folder / "in/a.fasta")]
    path = folder / table
    os.truncate(path, 0 if damage == "emptied" else path.stat().st_size // 2)
    assert not adopt(folder, fasta)
    assert why_read_again(folder, read_summary(folder), fasta, {})


@pytest.mark.slow
def test_a_run_makes_the_report_alone_and_a_new_file_embeds_its_new_sequences_alone(project):
    before = contents_and_times(project)
    run = project.snakemake("--config", "scaling=false")
    assert run.code == 0, run.output
    assert run.rules == Counter(["summarize", "all"])
    assert contents_and_times(project) == before
    old = (project.folder / "in" / "a.fasta").read_text().splitlines()[1].encode()
    project.write_fasta("c", [old, b"MKTAYIAKQR", b"MKVLAAGGW"])
    # The exports of a and b are written again: Snakemake takes their manifests for updated while the plan is open.
    manifests = [f"results/tiny/datasets/{name}/manifest.json" for name in "abc"]
    run = project.snakemake(*manifests, "--config", "scaling=false")
    assert run.code == 0, run.output
    assert run.rules == Counter(["ingest", "plan", "embed", "assemble"])
    assert before.items() <= contents_and_times(project).items()
    made = [json.loads(path.read_text()) for path in project.store.glob("jobs/*.json")]
    assert sorted(job["sequences"] for job in made) == [2, 9]
