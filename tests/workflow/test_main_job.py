"""The two lines of the README: the example, embedded with the demo model."""

import numpy as np
import pandas as pd
import pytest
import torch
from Bio import SeqIO

import lengthwise
from lengthwise.esm2 import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM WEIGHTS")


def proteins(project):
    return {record.id: str(record.seq) for record in SeqIO.parse(project.folder / "config" / "example.fasta", "fasta")}


@pytest.fixture(scope="module", params=[4, pytest.param(1, marks=pytest.mark.slow)], ids=["every fourth", "all"])
def reference(request, example, freed_memory_is_kept):
    """fair-esm's last layer of example proteins, one at a time in float32, without BOS and EOS."""
    project, _ = example
    model = checkpoint.reference_model(project.folder / "weights" / "demo.pt")
    convert = model.alphabet.get_batch_converter()
    with torch.inference_mode():
        return {
            name: model(convert([("", sequence)])[2], repr_layers=[6])["representations"][6][0, 1:-1].numpy()
            for name, sequence in list(proteins(project).items())[:: request.param]
        }


def test_the_run_ends_with_where_things_are_and_the_warning(example):
    _, run = example
    last_lines = run.output.rstrip().splitlines()[-6:]
    assert last_lines[0].startswith("Records     79 = 79 accepted + 0 duplicate + 0 rejected")
    assert "results/demo/datasets/example" in last_lines[1]
    assert "34,634 residues embedded in 1 job" in last_lines[2]
    assert "results/demo/report/index.html" in last_lines[3]
    assert last_lines[4].startswith("Next        python -c ")
    assert last_lines[-1].startswith("RANDOM WEIGHTS")
    assert "Traceback" not in run.output


def test_every_record_is_accounted_for_with_a_row_per_residue(example):
    project, _ = example
    ds = lengthwise.open(project.folder / "results/demo/datasets/example")
    expected = proteins(project)
    assert ds.ids == list(expected)
    assert {name: len(ds[name]) for name in ds.ids} == {name: len(sequence) for name, sequence in expected.items()}
    m = ds.manifest
    assert m["records"] == len(expected) == m["accepted"] + m["duplicate"] + m["rejected"]
    assert ds.verify() == len(expected)


def test_float16_storage_equals_fair_esm_within_its_rounding(example, reference):
    project, _ = example
    ds = lengthwise.open(project.folder / "results/demo/datasets/example")
    for name, theirs in reference.items():
        ours = ds[name]
        assert ours.dtype == np.float16
        # Half a unit in the last place of a float16, and the float32 tolerance.
        limit = 2.0**-11 * np.abs(theirs) + 2e-5 * max(1.0, float(np.sqrt(np.mean(theirs**2)))) + 2.0**-25
        assert (np.abs(ours.astype(np.float32) - theirs) <= limit).all(), name
        assert np.allclose(ds.pooled("mean")[ds.ids.index(name)], theirs.mean(0), rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reference", [1], indirect=True, ids=["all"])
def test_float32_storage_equals_fair_esm(example, reference):
    project, _ = example
    target = "results32/demo/datasets/example/manifest.json"
    run = project.snakemake(target, "--config", "storage_dtype=float32", "results=results32")
    assert run.code == 0, run.output
    ds = lengthwise.open(project.folder / "results32/demo/datasets/example")
    for name, theirs in reference.items():
        limit = 2e-5 * max(1.0, float(np.sqrt(np.mean(theirs**2))))
        assert np.abs(ds[name] - theirs).max() <= limit, name


def test_opening_random_weights_warns(example):
    project, _ = example
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        lengthwise.open(project.folder / "results/demo/datasets/example")


def test_a_second_run_does_nothing(example):
    project, _ = example
    run = project.snakemake()
    assert run.code == 0
    assert "Nothing to be done" in run.output


def test_the_report_is_one_page_with_its_figures_and_tables(example):
    project, _ = example
    report = project.folder / "results/demo/report"
    page = (report / "index.html").read_text()
    assert "RANDOM WEIGHTS" in page
    assert page.count("<svg") >= 4
    assert "http-equiv" not in page
    assert 'src="http' not in page
    metrics = pd.read_csv(report / "metrics.tsv", sep="\t")
    assert metrics["n_residues"].sum() == sum(map(len, proteins(project).values()))
    assert metrics["peak_allocated_bytes"].isna().all()  # on the CPU there is no such thing, and no zero in its place
    assert (metrics["peak_rss_bytes"] > 0).all()
    scaling = pd.read_csv(report / "scaling.tsv", sep="\t")
    assert set(scaling["engine"]) == {"lengthwise", "fair-esm"}
    assert scaling["length"].nunique() == 7
    measured = scaling[(scaling["status"] == "ok") & ~scaling["gradients"]].groupby("engine")["length"].nunique()
    assert (measured >= 3).all(), measured  # more on a machine that does nothing else


def test_snakemakes_own_report_holds_the_figures_with_captions(example):
    project, _ = example
    run = project.snakemake("--report", "report.zip")
    assert run.code == 0, run.output
    assert (project.folder / "report.zip").stat().st_size > 100_000


@pytest.mark.slow
def test_a_dataset_in_pieces_gives_the_same_numbers(example, project):
    """Many small shards and jobs instead of one of each: the same bytes for every protein."""
    first, _ = example
    project.configure(shard_bytes=2_000_000, job_minutes=0.15)
    run = project.snakemake("results/demo/datasets/example/manifest.json")
    assert run.code == 0, run.output
    whole = lengthwise.open(first.folder / "results/demo/datasets/example")
    pieces = lengthwise.open(project.folder / "results/demo/datasets/example")
    assert len(pieces.manifest["shards"]) > 10
    assert len(pieces.manifest["jobs"]) > 1
    for name in whole.ids:
        assert np.allclose(whole[name].astype(np.float32), pieces[name].astype(np.float32), rtol=2e-3, atol=2e-3)
