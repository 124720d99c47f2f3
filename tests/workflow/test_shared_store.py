"""A dataset belongs to the file that the config names, whatever folder a run begins in and whatever Snakemake's notes say.

What is served is judged by ids and digests against the FASTA file.
"""

import gzip
import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from project import Project, Run, fasta_text, held, of_file, random_sequences, second_folder, served, wait_for

from lengthwise.__main__ import main
from lengthwise.system.files import read_json
from lengthwise.system.locks import run_lock, run_lock_holder
from lengthwise.system.runs import this_run

A, B, C, D = (random_sequences(6, seed=seed) for seed in (1, 2, 3, 4))
NOTHING: Counter = Counter()


def reversed_sequences(sequences: list[bytes]) -> list[bytes]:
    """Other proteins of the same lengths, so that a file of them has the same size."""
    return [sequence[::-1] for sequence in sequences]


@pytest.fixture(scope="module")
def finished(made_once, tmp_path_factory) -> Project:
    """Folder one, with datasets a and b; what tests put in the place of A is embedded, so that they need not wait for it."""

    def make(folder: Path) -> Project:
        project = Project.with_tiny_model(folder / "one", a=A, b=[*B, *C, *reversed_sequences(A)])
        assert run(project).code == 0
        return project

    project = made_once("shared", make).copy(tmp_path_factory.mktemp("shared") / "one")
    project.keep()
    return project


def run(project: Project, *arguments: str) -> Run:
    return project.snakemake(*arguments)


@pytest.fixture
def one(finished):
    return finished.reset()


def test_another_file_of_that_name_in_a_second_folder_is_refused(one, tmp_path):
    """Of another size, and of the same one; also where the same was refused before."""
    two = second_folder(one, tmp_path / "two")
    for sequences in (C[:3], reversed_sequences(A), reversed_sequences(A)):
        two.write_fasta("a", sequences)
        os.utime(two.folder / "in/a.fasta", (1e9, 1e9))
        ended = run(two)
        assert ended.code == 1
        assert ended.rules["plan"] == ended.rules["embed"] == 0
        (line,) = set(ended.errors)
        for words in (str(one.folder / "in/a.fasta"), str(two.folder / "in/a.fasta"), "inputs: {", "rm -r "):
            assert words in line
        assert served(one, "a") == of_file(one.folder / "in/a.fasta")
    subprocess.run(line[line.index("rm -r ") :], shell=True, check=True, cwd=two.folder)
    assert two.make("a").code == 0
    assert served(one, "a") == of_file(two.folder / "in/a.fasta")


def test_the_same_content_under_another_path_is_accepted_and_embeds_nothing(one, tmp_path):
    two = second_folder(one, tmp_path / "two")
    for name in "ab":
        shutil.copy(one.folder / f"in/{name}.fasta", two.folder / "in")
    shards = one.shards()
    ended = run(two)
    assert ended.code == 0, ended.output
    assert ended.rules["embed"] == 0
    assert one.shards() == shards
    for project in (one, two):
        again = run(project)
        assert again.rules == NOTHING, again.output


def replaced_by_copy_p(one):
    other = one.folder / "other.fasta"
    other.write_text(fasta_text("x", reversed_sequences(A)))
    os.utime(other, (1e9, 1e9))
    subprocess.run(["cp", "-p", other, one.folder / "in/a.fasta"], check=True)


def replaced_by_checkout(one):
    """A file of the same size and another, older time."""
    (one.folder / "in/a.fasta").write_text(fasta_text("a", A))
    os.utime(one.folder / "in/a.fasta", (1.1e9, 1.1e9))


def retargeted(one):
    (one.folder / "new.fasta").write_text(fasta_text("a", C))
    os.utime(one.folder / "new.fasta", (1e9, 1e9))
    (one.folder / "in/a.fasta").unlink()
    (one.folder / "in/a.fasta").symlink_to("../new.fasta")


@pytest.mark.parametrize("notes", ["kept", "lost"])
def test_older_files_in_an_inputs_place_are_read(one, notes):
    """One after the other."""
    for replace in (replaced_by_copy_p, replaced_by_checkout, retargeted):
        replace(one)
        if notes == "lost":
            shutil.rmtree(one.folder / ".snakemake")
        before = sorted(one.store.rglob("*"))
        look = run(one, "--dry-run")
        assert look.rules["ingest"] == 1
        assert sorted(one.store.rglob("*")) == before
        ended = one.make("a", "b")
        assert ended.code == 0, ended.output
        assert ended.rules["ingest"] == 1
        assert served(one, "a") == of_file(one.folder / "in/a.fasta")
        assert served(one, "b") == of_file(one.folder / "in/b.fasta")
        assert one.make("a", "b").rules == NOTHING


def test_a_compressed_file_of_other_content_in_a_files_place(one):
    (one.folder / "in/a.fasta").unlink()
    (one.folder / "in/a.fasta.gz").write_bytes(gzip.compress(fasta_text("a", C).encode()))
    one.configure(inputs=["in/*.fasta*"], model="tiny.pt")
    ended = run(one)
    assert (ended.code, ended.rules) == (1, NOTHING)
    assert "a.fasta.gz" in ended.errors[0]
    subprocess.run(ended.errors[0][ended.errors[0].index("rm -r ") :], shell=True, check=True, cwd=one.folder)
    assert one.make("a").code == 0
    assert served(one, "a") == of_file(one.folder / "in/a.fasta.gz")


def test_the_same_content_under_two_names(one):
    shutil.copy(one.folder / "in/a.fasta", one.folder / "in/twin.fasta")
    shards = one.shards()
    assert one.make("a", "b", "twin").code == 0
    assert one.shards() == shards
    assert served(one, "a") == served(one, "twin") == of_file(one.folder / "in/a.fasta")


def test_a_policy_that_changed_while_the_notes_are_lost_is_applied(one):
    shutil.rmtree(one.folder / ".snakemake")
    one.configure(inputs=["in/*.fasta"], model="tiny.pt", long_sequences={"policy": "skip", "max_residues": 30})
    ended = one.make("a")
    assert ended.rules["ingest"] == 2
    manifest = read_json(one.store / "datasets/a/manifest.json")
    assert manifest["rejected"] == sum(len(sequence) > 30 for sequence in A)


def test_two_folders_one_after_the_other_leave_each_others_datasets(one, tmp_path):
    """Also where the second folder's file has the name of one in the first, and is named otherwise."""
    two = second_folder(one, tmp_path / "two", a=[*A[:2], *D])
    two.configure(inputs={"c": "in/a.fasta"}, model="tiny.pt")
    files = {path: path.stat().st_mtime_ns for path in (one.store / "datasets").rglob("*")}
    assert run(two).code == 0
    assert files.items() <= {path: path.stat().st_mtime_ns for path in (one.store / "datasets").rglob("*")}.items()
    shards = one.shards()
    for project in (one, two, one):
        ended = run(project)
        assert ended.code == 0, ended.output
        assert one.shards() == shards
        assert {ended.rules[rule] for rule in ("ingest", "embed", "assemble")} == {0}
        for name, fasta in (
            ("a", one.folder / "in/a.fasta"),
            ("b", one.folder / "in/b.fasta"),
            ("c", two.folder / "in/a.fasta"),
        ):
            assert served(one, name) == of_file(fasta)
    assert main_verify(one) == 0


def main_verify(project: Project) -> int:
    return main(["verify", str(project.store)])


@pytest.mark.parametrize("change", ["content", "policy"])
def test_what_another_folder_made_meanwhile_is_made_again(one, tmp_path, change):
    """Snakemake's notes in folder one say that the tables are as they were when it assembled the dataset."""
    two = second_folder(one, tmp_path / "two")
    inputs = {"inputs": [str(one.folder / "in" / "*.fasta")], "model": "tiny.pt"}
    fasta = one.folder / "in" / "a.fasta"
    if change == "content":
        one.write_fasta("a", reversed_sequences(A))
        two.configure(**inputs)
    else:
        two.configure(**inputs, long_sequences={"policy": "skip", "max_residues": 20})
    assert two.make("a", "b").code == 0
    if change == "content":
        assert served(one, "a") == of_file(fasta)
        one.write_fasta("a", A)
    else:
        assert served(one, "a").items() < of_file(fasta).items()
    again = one.make("a", "b")
    assert again.code == 0, again.output
    assert served(one, "a") == of_file(fasta)
    assert one.make("a", "b").rules == NOTHING


def test_a_forecast_reads_no_table_again_that_a_run_at_work_needs(one, tmp_path):
    two = second_folder(one, tmp_path / "two", a=A)
    tables = {path: path.stat().st_mtime_ns for path in (one.store / "inputs").rglob("*.parquet")}
    with run_lock(one.store, this_run()):
        look = run(two, "forecast")
    (line,) = set(look.errors)
    assert (look.code, look.rules) == (1, NOTHING)
    assert "wait until that run is done" in line
    assert f"process {os.getpid()}" in line
    assert tables == {path: path.stat().st_mtime_ns for path in tables}
    assert run(two, "forecast").code == 0


def test_a_run_without_snakemakes_lock_beside_that_of_a_killed_run(one):
    locks = one.folder / ".snakemake" / "locks"
    locks.mkdir(exist_ok=True)
    (locks / "0.output.lock").write_text("results/tiny/weights.json\n")
    left = one.store / "shards" / f".{'ab' * 16}.safetensors.0123abcd.tmp"
    left.write_bytes(b"of the killed run")
    one.write_fasta("a", reversed_sequences(A))
    with run_lock(one.store, this_run()):
        refused = run(one, "--nolock")
    assert (refused.code, refused.rules) == (1, NOTHING)
    ended = run(one, "--nolock", "results/tiny/datasets/a/manifest.json")
    assert ended.code == 0, ended.output
    assert served(one, "a") == of_file(one.folder / "in/a.fasta")
    assert not left.exists()


def test_a_dataset_is_there_until_its_successor_is(one, tmp_path):
    """Also where assembling it again fails."""
    before = of_file(one.folder / "in/a.fasta")
    one.write_fasta("a", C)
    broken = Project(one.folder, tmp_path / "checkout")
    for part in ("workflow", "scripts", "envs"):
        shutil.copytree(one.checkout / part, broken.checkout / part)
    (broken.checkout / "scripts/assemble.py").write_text("raise SystemExit(1)")
    ended = broken.make("a")
    assert (ended.code, ended.rules["assemble"]) == (1, 1)
    assert served(one, "a") == before
    assert one.make("a").code == 0
    assert served(one, "a") == of_file(one.folder / "in/a.fasta") != before


def test_two_runs_at_once_are_one_run_and_one_line(one, tmp_path):
    two = second_folder(one, tmp_path / "two", c=C)
    one.write_fasta("d", D)
    first = one.start("results/tiny/datasets/d/manifest.json")
    try:
        wait_for(lambda: read_lock(one) == first.pid)
        with held(first):
            for project in (two, one):
                ended = run(project)
                assert (ended.code, ended.rules) == (1, NOTHING)
                (line,) = set(ended.errors)
                for words in (f"process {first.pid}", str(one.folder), "at work in this store"):
                    assert words in line
            look = run(two, "--dry-run")
            assert (look.code, look.rules["ingest"]) == (0, 1)
        assert first.wait(timeout=600) == 0, (one.folder / "snakemake.out").read_text()
    finally:
        first.kill()
    assert two.make("c").code == 0
    for name, project in (("d", one), ("a", one), ("c", two)):
        assert served(one, name) == of_file(project.folder / f"in/{name}.fasta")


def read_lock(project: Project) -> int | None:
    return (run_lock_holder(project.store) or {}).get("process")


def test_the_lock_dies_with_its_process(one):
    one.write_fasta("d", D)
    first = one.start()
    wait_for(lambda: read_lock(one) == first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: read_lock(one) is None)
    assert run(one, "--unlock").code == 0
    assert one.make("d").code == 0
