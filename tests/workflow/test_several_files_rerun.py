"""Datasets of several files: what a run embeds when a file comes, goes or changes, and what the dataset then says."""

import os
import warnings
from collections import Counter
from pathlib import Path

import pytest
from project import Project, Run, random_sequences

import lengthwise
from lengthwise.system.files import read_json

A, B, C = (random_sequences(5, seed=seed) for seed in (11, 12, 13))
NOTHING: Counter = Counter()


@pytest.fixture(scope="module")
def finished(made_once, tmp_path_factory) -> Project:
    """`human` is of two files, `all` of a glob, and b.fasta is a part of both."""

    def make(folder: Path) -> Project:
        project = Project.with_tiny_model(folder / "one", a=A, b=B)
        project.configure(inputs={"human": ["in/a.fasta", "in/b.fasta"], "all": "in/[b-z].fasta"}, model="tiny.pt")
        run = project.snakemake()
        assert run.code == 0, run.output
        return project

    project = made_once("several", make).copy(tmp_path_factory.mktemp("several") / "one")
    project.keep()
    return project


@pytest.fixture
def project(finished):
    return finished.reset()


def opened(project: Project, name: str):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM WEIGHTS")
        return lengthwise.open(project.store)[name]


def again(project: Project) -> tuple[Counter, int]:
    """The rules that ran, and how many sequences were embedded."""
    before = project.shards()
    run: Run = project.snakemake()
    assert run.code == 0, run.output
    made = {name: entry for name, entry in project.shards().items() if before.get(name) != entry}
    return run.rules, sum(n for _, n in made.values())


def proteins(**files: list[bytes]) -> dict[str, str]:
    return {f"{name}_{i}": text.decode() for name, texts in files.items() for i, text in enumerate(texts)}


def test_nothing_is_to_be_done_twice_and_every_record_knows_its_file(project):
    run = project.snakemake()
    assert "Nothing to be done" in run.output
    ds = opened(project, "human")
    assert ds.sequences.to_dict() == proteins(a=A, b=B)
    assert ds.records["file"].tolist() == ["in/a.fasta"] * 5 + ["in/b.fasta"] * 5
    assert list(ds.where("file = 'in/b.fasta'")) == [f"b_{i}" for i in range(5)]
    assert opened(project, "all").records["file"].unique().tolist() == ["in/b.fasta"]
    manifest = read_json(project.store / "datasets/human/manifest.json")
    assert [(source["file"], source["records"]) for source in manifest["sources"]] == [
        ("in/a.fasta", 5),
        ("in/b.fasta", 5),
    ]
    assert "`in/b.fasta`, 5 records" in (project.store / "datasets/human/README.md").read_text()


def test_an_added_file_is_embedded_and_nothing_else(project):
    project.write_fasta("c", [*C, A[0]])
    project.configure(
        inputs={"human": ["in/a.fasta", "in/b.fasta", "in/c.fasta"], "all": "in/[b-z].fasta"}, model="tiny.pt"
    )
    rules, embedded = again(project)
    assert (rules["ingest"], rules["embed"], rules["assemble"], embedded) == (2, 1, 2, len(C))
    assert opened(project, "human").sequences.to_dict() == proteins(a=A, b=B, c=[*C, A[0]])
    assert opened(project, "all").sequences.to_dict() == proteins(b=B, c=[*C, A[0]])
    assert again(project) == (NOTHING, 0)


def test_a_removed_or_touched_file_is_read_and_nothing_is_embedded(project):
    project.configure(inputs={"human": ["in/a.fasta"], "all": "in/[b-z].fasta"}, model="tiny.pt")
    os.utime(project.folder / "in/b.fasta", (1e9, 1e9))
    rules, embedded = again(project)
    assert (rules["ingest"], rules["embed"], embedded) == (2, 0, 0)
    assert opened(project, "human").sequences.to_dict() == proteins(a=A)
    assert opened(project, "all").sequences.to_dict() == proteins(b=B)


def test_a_changed_file_is_read_wherever_it_is_named(project):
    project.write_fasta("b", [*C[:1], *B[1:]])
    rules, embedded = again(project)
    assert (rules["ingest"], rules["assemble"], embedded) == (2, 2, 1)
    for name, files in {"human": {"a": A, "b": [C[0], *B[1:]]}, "all": {"b": [C[0], *B[1:]]}}.items():
        assert opened(project, name).sequences.to_dict() == proteins(**files)


def error_of(run: Run) -> str:
    assert run.code != 0
    (line,) = [line for line in run.output.splitlines() if line.startswith("lengthwise: error: ")]
    return line


def test_other_files_under_that_name_and_a_name_that_is_there_twice_are_refused(project):
    project.write_fasta("x", C)
    project.write_fasta("y", C[:2])
    project.configure(inputs={"human": ["in/x.fasta", "in/y.fasta"]}, model="tiny.pt")
    line = error_of(project.snakemake())
    assert "the dataset 'human'" in line
    assert "was read from 2 other files" in line
    (project.folder / "config/config.yaml").write_text(
        "inputs:\n  human: in/a.fasta\n  human: in/b.fasta\nmodel: tiny.pt\n"
    )
    assert "line 3: the key 'human' is there twice" in error_of(project.snakemake("--dry-run"))
    assert opened(project, "human").sequences.to_dict() == proteins(a=A, b=B)
