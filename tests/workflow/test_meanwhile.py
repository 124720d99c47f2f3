"""What comes, moves or goes while a run is at work disturbs nothing; and what is not bound yet may change."""

import contextlib
from collections import Counter

import pytest
from project import Project, held, random_sequences, wait_for

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.system.files import read_json

A, B = (random_sequences(6, seed=seed) for seed in (1, 2))


@pytest.fixture
def project(tmp_path):
    return Project.with_tiny_model(tmp_path / "project", a=A, b=B)


def test_a_file_that_comes_waits_for_the_next_run_and_one_that_goes_is_not_missed(project):
    """Twice in a run: when an input is ingested, and when all are embedded. Then the files are back."""
    process = project.start()
    for late, moment in {"late": "inputs/*/summary.json", "later": "jobs/*.json"}.items():
        wait_for(lambda moment=moment: any(project.store.glob(moment)) or process.poll() is not None)
        with held(process):
            project.write_fasta(late, A[:2])
            for summary in project.store.glob("inputs/*/summary.json"):
                with contextlib.suppress(FileNotFoundError):  # moved before
                    fasta = project.folder / f"in/{summary.parent.name}.fasta"
                    fasta.rename(project.folder / f"{summary.parent.name}.moved")
    assert {path.stem for path in project.folder.glob("in/*")} == {"late", "later"}
    code, output = process.wait(timeout=600), (project.folder / "snakemake.out").read_text()
    assert code == 0, output
    assert "Exception" not in output
    assert {path.name for path in (project.store / "datasets").iterdir()} == {"a", "b"}
    assert "Records     12 = 12 accepted" in output
    for moved in project.folder.glob("*.moved"):
        moved.rename(project.folder / f"in/{moved.stem}.fasta")
    run = project.make("a", "b", "late", "later")
    assert (run.code, run.rules["ingest"], run.rules["embed"]) == (0, 2, 0)
    assert (project.store / "datasets/later/manifest.json").exists()


def test_settings_bind_from_the_first_shard_on(project):
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", layers=[0, -1], job_minutes=1e-9)
    assert project.snakemake("forecast").code == 0
    assert project.snakemake("results/tiny/plan/jobs.tsv").code == 0
    before = project.jobs
    assert len(before) == 12
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", outputs=["mean"])
    settings = read_json(project.store / "settings.json")
    run = project.snakemake("forecast")
    assert (run.code, run.errors) == (0, [])
    assert read_json(project.store / "settings.json") == settings  # a run may be at work, by these
    look = project.snakemake("--dry-run")
    assert (look.code, look.rules["plan"]) == (0, 1)
    assert project.jobs == before
    run = project.make("a", "b")
    assert run.code == 0, run.output
    manifest = read_json(project.store / "datasets/a/manifest.json")
    assert project.jobs == manifest["jobs"]
    assert (manifest["settings"]["outputs"], manifest["settings"]["layers"]) == (["mean"], [2])
    project.configure(inputs=["in/*.fasta"], model="tiny.pt")
    assert "outputs is [mean] there" in project.snakemake().errors[0]


def test_other_weights_are_taken_before_the_first_shard(project):
    assert project.snakemake("results/tiny/plan/jobs.tsv").code == 0
    first = read_json(project.store / "settings.json")["weights_sha256"]
    checkpoint.write_random(project.folder / "tiny.pt", ModelConfig(3, 64, 4), seed=5)
    run = project.make("a", "b")
    assert run.code == 0, run.output
    assert run.rules == Counter(fetch_model=1, plan=1, embed=1, assemble=2)
    manifest = read_json(project.store / "datasets/a/manifest.json")
    assert manifest["settings"]["weights_sha256"] != first
    assert manifest["settings"]["num_layers"] == 3
