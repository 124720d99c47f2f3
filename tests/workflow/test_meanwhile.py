"""What comes, moves or goes while a run is at work disturbs nothing; and what is not bound yet may change."""

from collections import Counter

import pytest
from project import Project, random_sequences, wait_for

from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.system.files import read_json

A = random_sequences(6, seed=1)
SLOW = random_sequences(400, seed=9, longest=900)


@pytest.fixture
def project(tmp_path):
    return Project.with_tiny_model(tmp_path / "project", a=A, b=SLOW)


def ends(project, process) -> str:
    code, output = process.wait(timeout=600), (project.folder / "snakemake.out").read_text()
    assert code == 0, output
    return output


@pytest.mark.parametrize(
    "moment", ["inputs/*/summary.json", "jobs/*.json"], ids=["when one is ingested", "when they are embedded"]
)
def test_a_file_that_comes_waits_for_the_next_run_and_one_that_goes_is_not_missed(project, moment):
    process = project.start()
    wait_for(lambda: any(project.store.glob(moment)))
    project.write_fasta("late", A[:2])
    for summary in project.store.glob("inputs/*/summary.json"):
        (project.folder / f"in/{summary.parent.name}.fasta").rename(project.folder / f"{summary.parent.name}.moved")
    output = ends(project, process)
    assert "Exception" not in output
    assert {path.name for path in (project.store / "datasets").iterdir()} == {"a", "b"}
    assert "Records     406 = 406 accepted" in output
    for moved in project.folder.glob("*.moved"):
        moved.rename(project.folder / f"in/{moved.stem}.fasta")
    run = project.snakemake()
    assert (run.code, run.rules["ingest"], run.rules["embed"]) == (0, 1, 0)
    assert (project.store / "datasets/late/manifest.json").exists()


def test_a_file_that_changes_before_it_is_read_is_one_line(project):
    process = project.start()
    wait_for(lambda: any((project.folder / ".snakemake").glob("lengthwise_inputs_*.json")))
    for name in "ab":
        project.write_fasta(name, A[:3])
    assert process.wait(timeout=600) == 1
    errors = [
        line for line in (project.folder / "snakemake.out").read_text().splitlines() if "lengthwise: error" in line
    ]
    assert errors
    assert all("changed since this run began" in line for line in errors)


def test_settings_bind_from_the_first_shard_on(project):
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", layers=[0, -1], shard_bytes=65536)
    assert project.snakemake("forecast").code == 0
    assert project.snakemake("results/tiny/plan/jobs.tsv").code == 0
    before = {path.name for path in project.store.glob("plan/jobs/*.parquet")}
    project.configure(inputs=["in/*.fasta"], model="tiny.pt", outputs=["mean"])
    settings = read_json(project.store / "settings.json")
    run = project.snakemake("forecast")
    assert (run.code, run.errors) == (0, [])
    assert read_json(project.store / "settings.json") == settings  # a run may be at work, by these
    look = project.snakemake("--dry-run")
    assert (look.code, look.rules["plan"]) == (0, 1)
    assert {path.name for path in project.store.glob("plan/jobs/*.parquet")} == before
    run = project.snakemake()
    assert run.code == 0, run.output
    manifest = read_json(project.store / "datasets/a/manifest.json")
    assert {path.stem for path in project.store.glob("plan/jobs/*.parquet")} == set(manifest["jobs"])
    assert (manifest["settings"]["outputs"], manifest["settings"]["layers"]) == (["mean"], [2])
    project.configure(inputs=["in/*.fasta"], model="tiny.pt")
    assert "outputs is [mean] there" in project.snakemake().errors[0]


def test_other_weights_are_taken_before_the_first_shard(project):
    assert project.snakemake("results/tiny/plan/jobs.tsv").code == 0
    first = read_json(project.store / "settings.json")["weights_sha256"]
    checkpoint.write_random(project.folder / "tiny.pt", ModelConfig(3, 64, 4), seed=5)
    run = project.snakemake()
    assert run.code == 0, run.output
    assert run.rules == Counter(
        dict.fromkeys(["fetch_model", "plan", "embed", "summarize", "all"], 1) | {"assemble": 2}
    )
    manifest = read_json(project.store / "datasets/a/manifest.json")
    assert manifest["settings"]["weights_sha256"] != first
    assert manifest["settings"]["num_layers"] == 3
