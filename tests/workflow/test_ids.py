"""Ids and paths are data: whatever is in them, they become no path, no wildcard and no word of a shell."""

import shutil
import subprocess

import pytest
from project import ROOT, Project

import lengthwise

HOSTILE = ROOT / "tests" / "hostile"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A project whose folders, files and ids are all odd."""
    folder = tmp_path_factory.mktemp("odd") / 'it\'s a "project" $(touch ran)'
    project = Project.with_tiny_model(folder, plain=[b"MKVLAWWC"])
    inputs = folder / "in" / "my; 'proteins' & $HOME"
    inputs.mkdir()
    for name, copy in [("odd_ids.fasta", "a b'\"$(touch ran);.fasta"), ("long_id.fasta", "größe 🧬.fasta")]:
        shutil.copy(HOSTILE / name, inputs / copy)
    project.configure(
        inputs={
            "odd": f"{inputs}/a b'\"$(touch ran);.fasta",
            "long": f"{inputs}/größe 🧬.fasta",
            "plain": "in/plain.fasta",
        },
        model="tiny.pt",
        results="my 'results' $(touch ran)",
    )
    run = project.snakemake()
    assert run.code == 0, run.output
    return project, run


def test_odd_ids_and_paths_are_embedded_and_read(odd):
    project, run = odd
    store = project.folder / "my 'results' $(touch ran)" / "tiny"
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        ds = lengthwise.open(store / "datasets" / "odd")
    assert ds.ids[:3] == ["../../etc/passwd", "$(touch", "'\"`;|&"]
    assert [len(ds[record_id]) for record_id in ds.ids] == [3, 4, 5, 6, 7, 8, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        (long_id,) = lengthwise.open(store / "datasets" / "long").ids
    assert len(long_id) == 10_000
    assert "Records     12 = 12 accepted + 0 duplicate + 0 rejected" in run.output


def test_nothing_in_a_name_was_run_or_became_a_path(odd):
    project, _ = odd
    assert [path for path in project.folder.parent.rglob("ran")] == []
    names = {path.name for path in project.folder.rglob("*")}
    assert not any("passwd" in name or "iiii" in name for name in names)


def test_the_command_that_a_run_ends_with_can_be_pasted_into_a_shell(odd):
    project, run = odd
    (line,) = [line for line in run.output.splitlines() if line.startswith("Next ")]
    command = ["bash", "-c", line.removeprefix("Next")]
    done = subprocess.run(command, cwd=project.folder, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("i (3, 32)\n")
    assert list(project.folder.rglob("ran")) == []


def test_a_second_run_finds_nothing_to_do(odd):
    project, _ = odd
    assert "Nothing to be done" in project.snakemake().output
