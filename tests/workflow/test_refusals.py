"""What a user gets to see of a mistake: one line, before any job where that can be, and never a traceback."""

import os
import shutil
from collections import Counter

import pytest
import torch
from project import ROOT, Project

from lengthwise.store.paths import dataset_name


def assert_one_line(run, *words):
    assert run.code != 0
    assert "Traceback" not in run.output
    assert len(set(run.errors)) == 1, run.output
    for word in words:
        assert word in run.errors[0]


def assert_before_any_job(run):
    assert "localrule" not in run.output
    assert "rule ingest" not in run.output


def slow(*values):
    """Cases whose messages tests/unit/test_config.py has too: each costs a start of Snakemake."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"inputs": ["nowhere.fasta"]}, ["inputs", "nowhere.fasta"]),
        ({"modle": "demo"}, ["unknown key 'modle'", "did you mean 'model'"]),
        ({"device": "cuda"}, ["device: cuda", "no GPU"]),
        slow({"inputs": ["config/*.fa.gz"]}, ["inputs", "config/*.fa.gz"]),
        slow({"long_sequences": {"polcy": "skip"}}, ["long_sequences.polcy"]),
        slow({"model": "esm2_t33_650M"}, ["model", "did you mean 'esm2_t33_650M_UR50D'"]),
        slow({"model": "nowhere.pt"}, ["model", "nowhere.pt"]),
        slow({"job_minutes": "many"}, ["job_minutes", "many"]),
        slow({"layers": "last"}, ["layers", "last"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without a GPU")
def test_a_mistake_in_the_config_is_one_line_before_any_job(project, config, words):
    project.configure(**config)
    run = project.snakemake()
    assert_one_line(run, *words)
    assert_before_any_job(run)


def test_a_config_that_is_no_yaml_is_snakemakes_own_message(project):
    (project.folder / "config" / "config.yaml").write_text("inputs: [unclosed\n")
    run = project.snakemake()
    assert run.code != 0
    assert "not valid JSON or YAML" in run.output
    assert "Traceback" not in run.output


BROKEN = {
    "empty.fasta": ["is empty"],
    "genbank.fasta": ["not FASTA", "byte 0, line 1", "GenBank"],
    "gzip_cut_in_data.fasta.gz": ["broken gzip", "cut short at byte 2,234"],
    "zstd_garbage_after.fasta.zst": ["broken zstd", "garbage from byte 50 on"],
    "same_id_other_sequence.fasta": ["records 1 and 3", "line 5"],
    "dna.fasta": ["looks like nucleotides"],
}


@pytest.fixture
def small(tmp_path) -> Project:
    return Project.with_tiny_model(tmp_path / "project", a=[b"MKV"])


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """One run for all of them, which goes on after each."""
    project = Project.with_tiny_model(tmp_path_factory.mktemp("broken") / "project")
    project.configure(
        inputs={dataset_name(name): str(ROOT / "tests" / "hostile" / name) for name in BROKEN}, model="tiny.pt"
    )
    return project, project.snakemake("--keep-going")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_input_is_one_line_and_nothing_of_it_is_left(broken, name):
    project, run = broken
    assert run.code != 0
    assert "Traceback" not in run.output
    (line,) = {line for line in run.errors if name in line}
    for word in BROKEN[name]:
        assert word in line
    folder = project.store / "inputs" / dataset_name(name)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_broken_inputs_stop_a_run_before_any_embedding(broken):
    _, run = broken
    assert len(set(run.errors)) == len(BROKEN)
    assert run.rules == Counter({"fetch_model": 1, "ingest": len(BROKEN)})


@pytest.mark.slow
def test_strict_stops_before_any_embedding_and_without_it_the_last_lines_count_the_rejected(small):
    (small.folder / "in.fasta").write_text(">a\nMKV\n>b\nM-V\n>c\nMKV\n")
    small.configure(inputs=["in.fasta"], model="tiny.pt", strict=True)
    run = small.snakemake()
    assert_one_line(run, "in.fasta", "record 2", "strict")
    assert run.rules["embed"] == 0
    small.configure(inputs=["in.fasta"], model="tiny.pt")
    run = small.snakemake("results/tiny/datasets/in/manifest.json")
    assert "Records     3 = 1 accepted + 1 duplicate + 1 rejected" in run.output


def test_an_input_that_changes_after_planning_is_one_line(small, tmp_path):
    """A job that comes before ingest changes it: to Snakemake the plan stands."""
    for folder in ("workflow", "scripts", "envs"):
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder)
    rules = tmp_path / "checkout" / "workflow" / "rules" / "ingest.smk"
    change = "rule change:\n    output: 'changed'\n    shell: 'echo MKV >> in.fasta; touch {output}'\n"
    rules.write_text(rules.read_text().replace("fasta=fasta_of,", "fasta=fasta_of, after='changed',", 1) + change)
    (small.folder / "in.fasta").write_text(">a\nMKV\n")
    small.configure(inputs=["in.fasta"], model="tiny.pt")
    small.checkout = tmp_path / "checkout"
    assert_one_line(small.snakemake(), "in.fasta", "changed since this run began")


@pytest.mark.slow
def test_an_input_that_changes_before_its_job_on_another_node_is_one_line(project):
    """Such a job reads the config and looks at the inputs once more; size and time of the change are those of before."""
    fasta = project.folder / "in.fasta"
    fasta.write_text(">a\nMKV\n")
    project.configure(inputs=["in.fasta"])
    assert project.snakemake("results/demo/weights.json").code == 0  # a run that has begun
    before = fasta.stat()
    fasta.write_text(">a\nMKA\n")
    os.utime(fasta, ns=(before.st_atime_ns, before.st_mtime_ns))
    on_node = ["--mode", "remote", "--target-jobs", "ingest:dataset=in", "--allowed-rules", "ingest", "--nolock"]
    assert_one_line(project.snakemake(*on_node), "in.fasta", "changed since this run began")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_input_is_one_line(project):
    (project.folder / "bad.fasta").write_text(">a\nM\n")
    (project.folder / "bad.fasta").chmod(0)
    project.configure(inputs=["bad.fasta"])
    assert_one_line(project.snakemake(), "bad.fasta", "cannot be read")


class _Evil:
    def __reduce__(self):
        return os.system, ("touch ran-code",)


@pytest.mark.parametrize(
    "content",
    [{"cfg": _Evil(), "model": {}}, {"esm.embeddings.word_embeddings.weight": None}],
    ids=["code", "Hugging-Face"],
)
def test_a_checkpoint_of_a_wrong_kind_is_one_line_and_runs_nothing(project, content):
    torch.save(content, project.folder / "wrong.pt")
    project.configure(model="wrong.pt")
    run = project.snakemake()
    assert_one_line(run, "wrong.pt")
    assert "weights_only" not in run.output  # torch's advice to run the code
    assert "\x1b" not in run.output
    assert not (project.folder / "ran-code").exists()
    assert not (project.folder / "results/wrong/settings.json").exists()


def test_a_layer_that_does_not_exist_is_one_line(small):
    small.configure(inputs=["in/*.fasta"], model="tiny.pt", layers=[7])
    assert_one_line(small.snakemake(), "layers", "7")
