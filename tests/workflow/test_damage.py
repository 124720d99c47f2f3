"""Damaged files of a store: a run makes again what is cut short, verify --repair and a run what has a flipped byte."""

from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project

from lengthwise.__main__ import main
from lengthwise.store.paths import QUARANTINE_ENDING

pytestmark = pytest.mark.slow

PROTEINS = [b"MKTAYIAKQR", b"MKVLAAGGW", b"MSTNPKPQRKTKRNT", b"MAHHHHHHVGTGSNDDDDKSPDP", b"MK1"]
# Files for which records vouch.
FILES = [
    "inputs/*/*.parquet",
    "plan/jobs.tsv",
    "plan/jobs/*",
    "datasets/*/*[!n]",
    "datasets/*/exports/*/*[!n]",
    "report/*[!n]",
]
# Records, which copies and other files replace. One copy of the settings has to be left.
RECORDS = [
    "weights.json",
    "inputs/*/*.json",
    "plan/*.json",
    "jobs/*",
    "datasets/*/*.json",
    "datasets/*/exports/*/*.json",
    "report/*.json",
]
# What a run does not make again by itself: it makes no embedding twice.
KEPT = ["metrics/*/*", "parity/*", "shards/*/*"]
# What comes out the same whenever it is made. Work orders that are made again have no residues.
SAME = ["plan/jobs.tsv", "inputs/*/*", "datasets/*/*.[!jm]*", "datasets/*/exports/*/*", "shards/*/*", "settings.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Project:
    """Two datasets that share sequences, every export, a report with a short study."""
    project = Project.with_tiny_model(tmp_path_factory.mktemp("damage") / "project", a=PROTEINS, b=PROTEINS[2:])
    exports = ["h5", "pt", "biotrainer", "parquet"]
    project.configure(
        inputs=["in/*.fasta"], model="tiny.pt", exports=exports, scaling=True, scaling_seconds=2, job_minutes=1e-9
    )
    run = project.snakemake()
    assert run.code == 0, run.output
    project.keep()
    return project


@pytest.fixture
def project(finished) -> Project:
    return finished.reset()


def files(project: Project, patterns: list[str]) -> dict[Path, bytes]:
    paths = (path for pattern in patterns for path in project.store.glob(pattern) if path.is_file())
    return {path: path.read_bytes() for path in paths if path.suffix != QUARANTINE_ENDING}


def emptied(content: bytes) -> bytes:
    return b""


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def spoil(project: Project, patterns: list[str], harm: Callable[[bytes], bytes]) -> list[Path]:
    found = files(project, patterns)
    for path, content in found.items():
        path.write_bytes(harm(content))
    return list(found)


def verify(project: Project, *flags: str) -> int:
    return main(["verify", str(project.store), *flags])


@pytest.mark.parametrize(
    ("patterns", "harm"),
    [(FILES, emptied), (RECORDS, halved), (["settings.json", "weights.json"], emptied)],
    ids=["files", "records", "settings"],
)
def test_a_run_makes_again_what_is_cut_short(project, patterns, harm, capsys):
    before, shards = files(project, SAME), project.shards()
    spoil(project, patterns, harm)
    run = project.snakemake()
    assert run.code == 0, run.output
    assert project.shards() == shards
    assert files(project, SAME) == before
    assert verify(project) == 0, capsys.readouterr().err
    assert "Nothing to be done" in project.snakemake("--dry-run").output


@pytest.mark.parametrize("patterns", [[*FILES, *KEPT], RECORDS], ids=["files", "records"])
def test_after_verify_repair_a_run_makes_again_what_has_a_flipped_byte(project, patterns, capsys):
    before = files(project, SAME)
    paths = spoil(project, patterns, flipped)
    assert verify(project) == 1
    named = capsys.readouterr().err
    assert verify(project, "--repair") == 0, named
    # Nothing vouches for the proteins of a pt export whose files.tsv is damaged: they are made again with it.
    assert [path for path in paths if path.exists() and path.suffix != ".pt"] == []
    run = project.snakemake()
    assert run.code == 0, run.output
    assert files(project, SAME) == before
    assert verify(project) == 0, capsys.readouterr().err
    assert "Nothing to be done" in project.snakemake("--dry-run").output
