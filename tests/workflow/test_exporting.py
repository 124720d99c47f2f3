"""Exports in the workflow: asked of a finished store, they alone run, and again when their dataset changed."""

import os
from collections import Counter

import pytest
import yaml

from lengthwise.system.files import read_json, write_json

KINDS = ["h5", "pt", "biotrainer", "parquet"]
FILES = {
    "h5/per-residue.h5",
    "h5/per-protein.h5",
    "biotrainer/embeddings_file_demo.h5",
    "biotrainer/reduced_embeddings_file_demo.h5",
    "parquet/pooled.parquet",
    "pt/files.tsv",
    *(f"{kind}/receipt.json" for kind in KINDS),
}


@pytest.fixture(scope="module")
def exported(example, tmp_path_factory):
    """A copy of the finished example, on which every export was asked for."""
    project = example[0].copy(tmp_path_factory.mktemp("exports") / "project")
    config = project.folder / "config" / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"exports": KINDS}))
    run = project.snakemake()
    assert run.code == 0, run.output
    return project, run


def test_an_export_asked_of_a_finished_store_is_all_that_runs(exported):
    project, run = exported
    assert run.rules == Counter([*(f"export_{kind}" for kind in KINDS), "all"])
    folder = project.folder / "results/demo/datasets/example/exports"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found >= FILES
    assert len(found - FILES) == 79
    assert all(path.startswith("pt/sp|") for path in found - FILES)


def test_exports_that_are_there_are_not_made_again_until_their_dataset_changes(exported):
    project, _ = exported
    assert "Nothing to be done" in project.snakemake("--dry-run").output
    manifest = project.folder / "results/demo/datasets/example/manifest.json"
    write_json(manifest, read_json(manifest) | {"created": "later"})
    os.utime(manifest)
    assert project.snakemake("--dry-run").rules.keys() == {*(f"export_{kind}" for kind in KINDS), "summarize", "all"}
