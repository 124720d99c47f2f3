"""The worked example of docs/example.md, with a tiny model in the demo's place."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from Bio import SeqIO
from Bio.SeqUtils.ProtParamData import kd
from PIL import Image

from lengthwise.esm2.fair_esm_layout import RANDOM_SEED_KEY

ROOT = Path(__file__).resolve().parents[2]
FASTA = ROOT / "config" / "example.fasta"
LABELS = ROOT / "docs" / "example_labels.tsv"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("worked_example", ROOT / "docs" / "example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_writes_a_table_and_a_figure_that_say_that_weights_are_random(example, tiny_checkpoint, tmp_path, capsys):
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        example.main(tmp_path / "new" / "folder", FASTA, LABELS, str(tiny_checkpoint))
    table = pd.read_csv(tmp_path / "new/folder/example.tsv", sep="\t", comment="#")
    assert list(table["n"]) == ["67 proteins"] * 2 + ["34634 residues"] * 2
    # Composition tells bacteria from eukaryotes, and a residue its surroundings: both better than chance, neither perfectly.
    assert ((table["score"] > table["chance"] + 0.08) & (table["score"] < 0.95)).all()
    for said in (capsys.readouterr().out, (tmp_path / "new/folder/example.tsv").read_text()):
        assert "RANDOM WEIGHTS" in said.splitlines()[0]
    figure = np.asarray(Image.open(tmp_path / "new/folder/example.png").convert("RGB"))
    assert min(figure.shape[:2]) > 500
    assert len(np.unique(figure.reshape(-1, 3), axis=0)) > 100


def test_weights_that_are_not_marked_as_random_are_not_called_so(example, tiny_checkpoint, tmp_path, capsys):
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(tiny_checkpoint, weights_only=True)
    delattr(saved["cfg"]["model"], RANDOM_SEED_KEY)
    torch.save(saved, tmp_path / "trained.pt")
    first = "".join(f">{record.id}\n{record.seq[:30]}\n" for record in SeqIO.parse(FASTA, "fasta"))
    (tmp_path / "short.fasta").write_text(first)
    example.main(tmp_path, tmp_path / "short.fasta", LABELS, str(tmp_path / "trained.pt"))
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "trained.pt")


def test_each_protein_of_the_example_has_a_label(example):
    assert list(example.read_labels(LABELS).index) == [record.id for record in SeqIO.parse(FASTA, "fasta")]
    assert example.read_labels(LABELS).notna().all()


def test_a_hydrophobic_stretch_is_of_windows_whose_mean_hydropathy_is_above_zero(example):
    """Biopython has the scale; its own sliding mean skips the middle residue. This protein has B and Z, which count as zero."""
    sequence = str(next(SeqIO.parse(FASTA, "fasta")).seq)
    half = example.WINDOW // 2
    windows = [sequence[max(0, i - half) : i + half + 1] for i in range(len(sequence))]
    expected = [round(sum(kd.get(letter, 0) for letter in window), 3) > 0 for window in windows]
    assert example.hydrophobic(example.identities(sequence)).tolist() == expected


def test_what_a_residue_is_trained_on_never_holds_its_own_protein(example):
    """Each protein has labels of its own, which no other protein could teach."""
    rng = np.random.default_rng(0)
    rows = [np.tile(rng.normal(size=64), (200, 1)).astype(np.float32) for _ in range(40)]
    truth = [np.full(200, number % 2 == 0) for number in range(40)]
    _, chance, score, _ = example.score_residues(truth, example.predict_residues(rows, truth))
    assert abs(score - chance) < 0.3


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("name\tgroup\nP1\tx\n", "not a tab-separated table with columns id and group"),
        ("id\tgroup\nP1\tx\nP1\ty\n", "a line for each id"),
    ],
)
def test_labels_that_are_no_table_of_ids_and_groups_are_refused(example, tmp_path, labels, said):
    (tmp_path / "labels.tsv").write_text(labels)
    with pytest.raises(SystemExit, match=said):
        example.read_labels(tmp_path / "labels.tsv")


def test_groups_that_are_too_small_are_said_so(example):
    with pytest.raises(SystemExit, match="fewer than two groups have 10 proteins"):
        example.score_groups(np.zeros((12, 3)), np.array(["x"] * 11 + ["y"], dtype=object))


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    command = [
        sys.executable,
        ROOT / "docs" / "example.py",
        tmp_path,
        "--fasta",
        "missing.fasta",
        "--model",
        "missing.pt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "missing" in done.stderr
