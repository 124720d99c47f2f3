"""The table of reruns: what changes, which rules run then, and how many sequences are embedded."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from project import ROOT, Project, Run, random_sequences

A = random_sequences(6, seed=1)
B = [*A[:2], *random_sequences(2, seed=2)]  # half of it is in A
C = [*B[2:], *random_sequences(2, seed=3)]
NOTHING: Counter = Counter()


@pytest.fixture(scope="module")
def finished(made_once, tmp_path_factory):
    """A finished run on a.fasta and b.fasta, made by a checkout of its own."""

    def copy_checkout(folder: Path) -> Path:
        for part in ("workflow", "scripts", "envs"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        return folder

    def make(folder: Path) -> tuple[Project, Run]:
        project = Project.with_tiny_model(folder / "project", a=A, b=B)
        project.checkout = copy_checkout(folder / "checkout")
        run = project.snakemake()
        assert run.code == 0, run.output
        return project, run

    made, run = made_once("reruns", make)
    folder = tmp_path_factory.mktemp("reruns")
    project = made.copy(folder / "project")
    project.checkout = copy_checkout(folder / "checkout")
    project.keep()
    return project, run


@pytest.fixture
def project(finished):
    return finished[0].reset()


def rerun(project, *arguments):
    """(rules that ran, sequences that were embedded, files of other datasets that changed)."""
    before = project.shards()
    run = project.snakemake(*arguments)
    assert run.code == 0, run.output
    made = {name: entry for name, entry in project.shards().items() if before.get(name) != entry}
    return run.rules, sum(n for _, n in made.values())


def times(folder):
    """Without the run's lock, which each run takes."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def reconfigure(project, **changes):
    path = project.folder / "config" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_first_run(finished):
    project, run = finished
    once = ["fetch_model", "plan", "embed", "summarize", "all"]
    assert run.rules == Counter({**dict.fromkeys(once, 1), "ingest": 2, "assemble": 2})
    assert sum(n for _, n in project.shards().values()) == 8


def test_second_run(project):
    run = project.snakemake()
    assert run.rules == NOTHING
    assert "Nothing to be done" in run.output


def test_what_changes_no_number_reruns_nothing(finished, project):
    """How work is cut, touched weights and scripts, an edited package; then without Snakemake's notes too."""
    reconfigure(project, batch_tokens=64, job_minutes=1, shard_bytes=65536)
    os.utime(project.folder / "tiny.pt")
    scripts = finished[0].checkout / "scripts"
    for script in scripts.glob("*.py"):
        os.utime(script)
    module = scripts / "lengthwise/jobs/embed_job.py"
    module.write_text(module.read_text() + "\n# edited\n")
    assert rerun(project) == (NOTHING, 0)
    shutil.rmtree(project.folder / ".snakemake")
    assert rerun(project) == (NOTHING, 0)


def test_a_folder_that_moved_embeds_nothing(project, tmp_path):
    """Whether these are the same files under other paths only their content says."""
    moved = Project(project.folder.rename(tmp_path / "moved"), project.checkout)
    assert rerun(moved) == (Counter(ingest=2, plan=1), 0)
    assert rerun(moved) == (NOTHING, 0)


def test_touched_input(project):
    os.utime(project.folder / "in/a.fasta")
    assert rerun(project) == (Counter(["ingest", "plan"]), 0)


@pytest.mark.slow
def test_replaced_by_an_older_file(project):
    project.write_fasta("b", [*B[:-1], random_sequences(1, seed=9)[0]])
    os.utime(project.folder / "in/b.fasta", (1e9, 1e9))
    assert rerun(project) == (Counter(["ingest", "plan", "embed", "assemble", "summarize", "all"]), 1)


@pytest.mark.slow
def test_appended_record(project):
    project.write_fasta("b", [*B, b"MKTAYIAKQR"])
    others = times(project.store / "datasets/a")
    assert rerun(project) == (Counter(["ingest", "plan", "embed", "assemble", "summarize", "all"]), 1)
    assert times(project.store / "datasets/a") == others


def test_new_file_that_shares_half_of_its_sequences(project):
    project.write_fasta("c", C)
    others = times(project.store / "datasets")
    assert rerun(project) == (Counter(["ingest", "plan", "embed", "assemble", "summarize", "all"]), 2)
    assert others.items() <= times(project.store / "datasets").items()


@pytest.mark.slow
def test_removed_file(project):
    (project.folder / "in/b.fasta").unlink()
    others = times(project.store / "datasets")
    assert rerun(project) == (Counter(["plan", "summarize", "all"]), 0)
    assert times(project.store / "datasets") == others


@pytest.mark.slow
def test_renamed_file(project):
    (project.folder / "in/b.fasta").rename(project.folder / "in/d.fasta")
    assert rerun(project) == (Counter(["ingest", "plan", "assemble", "summarize", "all"]), 0)


def test_what_the_numbers_are_is_refused(project):
    changes = {"precision": "bfloat16", "layers": [1], "storage_dtype": "float32", "outputs": ["mean"]}
    reconfigure(project, **changes)
    before = times(project.store)
    run = project.snakemake()
    assert run.code == 1
    assert run.rules == NOTHING
    assert "Traceback" not in run.output
    (line,) = run.errors
    for key in changes:
        assert f"{key} is " in line
    assert "results" in line
    assert times(project.store) == before


def test_other_weights_under_the_same_name_are_refused(project):
    with open(project.folder / "tiny.pt", "ab") as file:
        file.write(b"\0")
    run = project.snakemake()
    assert run.rules == NOTHING
    assert "weights_sha256" in run.errors[0]


@pytest.mark.parametrize(
    "damage",
    [
        os.unlink,
        pytest.param(lambda shard: os.truncate(shard, shard.stat().st_size - 1), marks=pytest.mark.slow),
        pytest.param(lambda shard: shard.rename(f"{shard}.bak"), marks=pytest.mark.slow),
    ],
    ids=["deleted", "truncated", "moved aside"],
)
def test_a_damaged_shard_is_made_again(project, damage):
    (shard,) = project.store.glob("shards/*/*.safetensors")
    content = shard.read_bytes()
    damage(shard)
    run = project.snakemake()
    assert run.code == 0, run.output
    assert run.rules == Counter({"embed": 1, "assemble": 2, "summarize": 1, "all": 1})
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    "argument",
    ["--dry-run", "--touch", *(pytest.param(look, marks=pytest.mark.slow) for look in ("-np", "--unlock", "--dag"))],
)
def test_who_only_looks_changes_no_file(project, argument):
    next(project.store.glob("shards/*/*.safetensors")).unlink()
    before = times(project.store)
    run = project.snakemake(argument)
    assert "a run makes it again" in run.output
    assert times(project.store).keys() == before.keys()
    if argument != "--touch":
        assert times(project.store) == before


@pytest.mark.slow
def test_deleted_index_and_lookup(project):
    (project.store / "datasets/a/index.parquet").unlink()
    (project.store / "datasets/b/lookup.arrow").unlink()
    assert rerun(project) == (Counter({"assemble": 2, "summarize": 1, "all": 1}), 0)


def test_deleted_plan(project):
    work_orders = {path.name for path in project.store.glob("plan/jobs/*")}
    shutil.rmtree(project.store / "plan")
    rules, embedded = rerun(project)
    assert embedded == 0
    assert rules["embed"] == 0
    assert {path.name for path in project.store.glob("plan/jobs/*")} == work_orders


def test_deleted_settings_come_back_from_a_manifest(project):
    settings = (project.store / "settings.json").read_bytes()
    (project.store / "settings.json").unlink()
    reconfigure(project, precision="bfloat16")
    run = project.snakemake("--forcerun", "fetch_model")
    assert "precision is float32 there" in run.errors[0]
    reconfigure(project, precision="auto")
    assert rerun(project) == (NOTHING, 0)
    assert (project.store / "settings.json").read_bytes() == settings


@pytest.mark.slow
def test_deleted_weights_receipt(project):
    (project.store / "weights.json").unlink()
    rules, embedded = rerun(project)
    assert (rules["fetch_model"], rules["embed"], embedded) == (1, 0, 0)


def test_other_weights_with_the_same_size_and_time_are_refused(project):
    old = (project.folder / "tiny.pt").stat()
    content = bytearray((project.folder / "tiny.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (project.folder / "tiny.pt").write_bytes(content)
    os.utime(project.folder / "tiny.pt", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert "weights_sha256" in project.snakemake().errors[0]


def test_forcerun_plan(project):
    assert rerun(project, "--forcerun", "plan") == (Counter(["plan"]), 0)


@pytest.mark.slow
def test_forceall_keeps_the_shards_and_the_settings(project):
    settings = times(project.store)[project.store / "settings.json"]
    rules, embedded = rerun(project, "--forceall")
    assert embedded == 0
    assert rules["embed"] == 1
    assert times(project.store)[project.store / "settings.json"] == settings


@pytest.mark.slow
def test_the_scaling_study_is_taken_up_left_out_and_taken_up_again(project):
    study, page = (project.store / "report" / name for name in ("scaling.tsv", "index.html"))
    assert "The scaling study is off" in page.read_text()
    reconfigure(project, scaling=True, scaling_seconds=1)
    assert rerun(project) == (Counter(["scaling", "summarize", "all"]), 0)
    assert "The scaling study is off" not in page.read_text()
    measured = study.read_bytes()
    for on in (False, True):
        reconfigure(project, scaling=on)
        assert rerun(project) == (Counter(["summarize", "all"]), 0)
        assert ("The scaling study is off" in page.read_text()) != on
        assert study.read_bytes() == measured


@pytest.mark.slow
def test_a_wrong_input_that_was_planned_and_removed_costs_nothing(project):
    project.write_fasta("wrong", random_sequences(5, seed=7))
    assert project.snakemake("results/tiny/plan/jobs.tsv").code == 0
    (project.folder / "in/wrong.fasta").unlink()
    assert rerun(project) == (Counter(["plan"]), 0)
    assert rerun(project) == (NOTHING, 0)


def test_two_hundred_inputs_at_once(project):
    for number in range(200):
        project.write_fasta(f"n{number:03}", [A[number % 6], bytes([65]) * (number + 3)])
    others = times(project.store / "datasets")
    run = project.snakemake("results/tiny/plan/jobs.tsv", "--dry-run")
    assert run.code == 0
    assert run.rules["ingest"] == 200
    assert times(project.store / "datasets") == others
