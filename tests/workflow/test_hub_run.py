"""A run with a model of the Hugging Face hub, and the same model from a folder."""

import os

import h5py
import numpy as np
import pytest
from project import Project, random_sequences

import hugging_face
from hub_server import Hub
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.system.files import read_json


@pytest.fixture
def project(tmp_path) -> Project:
    return Project.with_tiny_model(tmp_path / "project", a=random_sequences(20, seed=3))


def test_a_model_of_the_hub_is_embedded_and_its_folder_gives_the_same(project, monkeypatch, tmp_path):
    model, hub = hugging_face.write(tmp_path / "tuned", ModelConfig(2, 32, 2), shard_size="20kB"), Hub()
    commit = hub.push("lab/tuned", model, "v1")
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    project.configure(inputs=["in/*.fasta"], model="lab/tuned@v1", exports=["h5"])
    store = project.folder / "results" / "lab--tuned--v1"
    target = "results/lab--tuned--v1/datasets/a/exports/h5/per-residue.h5"
    run = project.snakemake(target)
    assert run.code == 0, run.output
    weights = read_json(store / "datasets" / "a" / "manifest.json")["weights"]
    assert weights["hub"] == {"id": "lab/tuned", "revision": "v1", "commit": commit, "address": hub.url}
    assert weights["origin"] == f"{hub.url}/lab/tuned at {commit}"
    assert read_json(store / "settings.json")["inv_freq"] == "file"

    hub.close()  # another file needs no hub any more
    project.write_fasta("b", random_sequences(5, seed=4))
    run = project.snakemake("results/lab--tuned--v1/datasets/b/manifest.json", "forecast")
    assert run.code == 0, run.output
    assert read_json(store / "forecast" / "forecast.json")["disk"]["download"] is None
    assert not run.rules["fetch_model"]

    project.configure(inputs=["in/*.fasta"], model=str(model), exports=["h5"])
    run = project.snakemake("results/tuned/datasets/a/exports/h5/per-residue.h5")
    assert run.code == 0, run.output
    ours, theirs = (project.folder / "results" / name / target.split("/", 2)[2] for name in ("lab--tuned--v1", "tuned"))
    with h5py.File(ours) as ours, h5py.File(theirs) as theirs:
        assert len(ours) == 20
        assert all(np.array_equal(ours[name][:], theirs[name][:]) for name in ours)


def test_what_is_no_model_is_one_line_before_anything_runs(project, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    cases = {
        str(tmp_path / "pickled"): ["pytorch_model.bin", "can run code", "save_pretrained"],
        str(tmp_path / "none"): ["there is no file or folder"],
        "esm1b_t33_650M_UR50S": ["'esm1b_t33_650M_UR50S' is ESM-1b, which is not served yet"],
        "esm2_t33_650M": ["is not a model", "org/name"],
    }
    for model, words in cases.items():
        project.configure(inputs=["in/*.fasta"], model=model)
        run = project.snakemake("-n")
        assert run.code == 1
        (line,) = run.errors
        assert [word for word in words if word not in line] == [], line
    assert not (project.folder / "results").exists()
