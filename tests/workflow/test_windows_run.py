"""Long proteins through the workflow: windows, the report's comparison with whole proteins, and other policies afterwards."""

import warnings
from collections import Counter

import numpy as np
import pandas as pd
from project import Project, random_sequences

import lengthwise.read.dataset

SHORT = random_sequences(4, seed=11)
LONG = [b"".join(random_sequences(12, seed=seed)) for seed in (12, 13)]
SIZES = {"window_residues": 64, "overlap": 16}
WINDOWS = {"policy": "window", **SIZES}


def configure(project: Project, **long_sequences) -> None:
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", long_sequences=long_sequences)


def opened(project: Project) -> lengthwise.read.dataset.Dataset:
    with warnings.catch_warnings(action="ignore"):  # of random weights
        return lengthwise.open(project.store / "datasets" / "a")


def run(project: Project) -> Counter:
    done = project.snakemake()
    assert done.code == 0, done.output
    return done.rules


def test_a_store_goes_from_whole_proteins_to_windows_and_back(tmp_path):
    project = Project.with_tiny_model(tmp_path / "project", a=[*SHORT, *LONG])
    assert "windows" not in run(project)
    whole = {name: np.array(rows) for name, rows in opened(project).items()}
    shards = {path: path.stat().st_mtime_ns for path in project.store.glob("shards/*/*")}
    page, table = project.store / "report" / "index.html", project.store / "report" / "windows.tsv"
    assert "Windows beside whole proteins" not in page.read_text()

    configure(project, **WINDOWS)
    rules = run(project)
    assert (rules["ingest"], rules["embed"], rules["windows"], rules["summarize"]) == (1, 1, 1, 1)
    assert "Windows beside whole proteins" in page.read_text()
    assert "Nothing to be done" in project.snakemake().output
    ds, compared = opened(project), pd.read_csv(table, sep="\t").set_index("id")
    long = [name for name, rows in whole.items() if len(rows) > 64]
    assert len(long) == 2
    assert set(compared.index) == set(long)
    for name, rows in ds.items():
        if name in long:
            spread, joined, full = whole[name].std(0), np.float64(rows), np.float64(whole[name])
            deviation = np.median(np.sqrt(np.square(joined - full).mean(0)) / spread)
            assert 0 < deviation < 2
            assert abs(compared.loc[name, "deviation"] / deviation - 1) < 0.05  # the store's rows are in float16
            assert compared.loc[name, "windows"] == -(-(len(full) - 16) // 48)
        else:
            np.testing.assert_array_equal(rows, whole[name])
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "whole proteins stay where they are"

    table.unlink()
    assert run(project) == Counter(["windows", "summarize", "all"])
    configure(project, policy="full")
    rules = run(project)
    assert (rules["ingest"], rules["embed"], rules["windows"]) == (1, 0, 0)
    assert "Windows beside whole proteins" not in page.read_text()
    for name, rows in opened(project).items():
        np.testing.assert_array_equal(rows, whole[name])
