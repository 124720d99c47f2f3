"""What the store calls stale: each thing that a run has to make again, and nothing in a store that is whole."""

import dataclasses
import json
import os
from dataclasses import asdict

import pytest

from lengthwise.export.run import export
from lengthwise.ingest.identity import input_stamp
from lengthwise.ingest.judge import Policy
from lengthwise.maintain.stale import Wanted, discard_stale, restore, stale_outputs
from lengthwise.store.settings import load
from lengthwise.system.files import read_json, write_json


@pytest.fixture(scope="module")
def pristine(small_store, random_proteins):
    store = small_store()
    store.ingest("a", random_proteins(20))
    store.ingest("b", random_proteins(12, seed=1))
    store.run(shard_bytes=16_000)
    for kind in ("pt", "parquet"):
        export(store.path / "datasets" / "a", kind)
    return store


@pytest.fixture
def store(pristine, tmp_path):
    """A copy whose summaries name the FASTA files of the original."""
    copy = pristine.copy(tmp_path / "copy")
    copy.folder = pristine.folder
    return copy


def wanted(store, **changes) -> Wanted:
    stamps = {name: [input_stamp(store.folder / f"{name}.fasta")] for name in store.datasets}
    asked = {"retry_rejected": False, "exports": ["pt", "parquet"], "scaling": False, "model_sha256": ""}
    return Wanted(**{"stamps": stamps, "policy": asdict(Policy()), **asked, **changes})


def stale(store, **changes) -> dict[str, str]:
    found = stale_outputs(store.path, wanted(store, **changes), load(store.path))
    return {str(path.relative_to(store.path)): why for path, why in found.items()}


def test_a_store_that_is_whole_has_nothing_stale(store):
    assert stale(store) == {}


def test_an_empty_store_has_nothing_stale(tmp_path, store):
    assert stale_outputs(tmp_path / "new", wanted(store), None) == {}


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "gone": os.unlink,
}

# {file: the output that is made again}
FILES = {
    "inputs/a/summary.json": "inputs/a/records.parquet",
    "inputs/a/records.parquet": "inputs/a/records.parquet",
    "inputs/a/sequences.parquet": "inputs/a/records.parquet",
    "plan/inputs.json": "plan/jobs.tsv",
    "plan/jobs.tsv": "plan/jobs.tsv",
    "plan/jobs/*.parquet": "plan/jobs.tsv",
    "datasets/a/index.parquet": "datasets/a/manifest.json",
    "datasets/a/lookup.arrow": "datasets/a/manifest.json",
    "datasets/a/rejected.tsv": "datasets/a/manifest.json",
    "datasets/a/README.md": "datasets/a/manifest.json",
    "datasets/a/manifest.json": "datasets/a/manifest.json",
    "datasets/a/exports/pt/files.tsv": "datasets/a/exports/pt/files.tsv",
    "datasets/a/exports/pt/p0.pt": "datasets/a/exports/pt/files.tsv",
    "datasets/a/exports/parquet/pooled.parquet": "datasets/a/exports/parquet/pooled.parquet",
    "weights.json": "weights.json",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(("file", "output"), FILES.items(), ids=FILES)
def test_a_file_that_is_gone_or_cut_short_is_made_again(store, file, output, damage):
    if file.endswith("p0.pt") and damage is not os.unlink:
        pytest.skip("the files of a pt export are known by their number; verify knows their checksums")
    damage(next(store.path.glob(file)))
    assert output in stale(store)
    assert {path.split("/")[1] for path in stale(store) if path.startswith("datasets")} <= {"a"}


def test_a_dataset_is_judged_although_its_file_is_read_again(store):
    """Reading the file again gives the same tables: nothing else would tell that the dataset is damaged."""
    folder = store.path / "datasets" / "a"
    for path in (store.inputs("a") / "records.parquet", folder / "index.parquet"):
        path.write_bytes(b"")
    (store.path / "datasets" / "b" / "README.md").unlink()
    (store.inputs("b") / "summary.json").unlink()
    assert stale(store).keys() == {
        "inputs/a/records.parquet",
        "inputs/b/records.parquet",
        "datasets/a/manifest.json",
        "datasets/b/manifest.json",
    }


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_settings_come_back_from_a_copy(store, damage):
    settings = (store.path / "settings.json").read_bytes()
    damage(store.path / "settings.json")
    restore(store.path, wanted(store), store.config)
    assert (store.path / "settings.json").read_bytes() == settings
    assert stale(store) == {}


@pytest.mark.parametrize("pattern", ["jobs/*.json", "shards/*/*.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_job_without_its_shards_or_record_is_embedded_again(store, pattern, damage):
    path = next(store.path.glob(pattern))
    damage(path)
    found = stale(store)
    discard_stale(store.path, [store.path / output for output in found])
    if damage is os.unlink and pattern.startswith("jobs"):
        assert found == {}  # Snakemake itself finds that it is missing
    else:
        assert [output.split("/")[0] for output in found] == ["jobs"]
        assert not any((store.path / output).exists() for output in found)


@pytest.mark.parametrize(
    ("changes", "outputs"),
    [
        ({"policy": asdict(Policy(max_residues=7))}, ["inputs/a/records.parquet", "inputs/b/records.parquet"]),
        ({"retry_rejected": True}, ["plan/jobs.tsv"]),
        ({"model_sha256": "0" * 64}, ["weights.json"]),
    ],
    ids=str,
)
def test_what_the_config_wants_otherwise_is_made_again(store, changes, outputs):
    assert list(stale(store, **changes)) == outputs


def test_a_plan_of_more_or_fewer_datasets_is_made_again(store):
    one = {"a": wanted(store).stamps["a"]}
    assert stale(store, stamps=one) == {"plan/jobs.tsv": "it is of other datasets"}


def test_a_dataset_of_another_content_or_plan_than_the_tables_is_assembled_again(store):
    path = store.path / "inputs/a/summary.json"
    write_json(path, read_json(path) | {"input_sha256": "other"})
    assert stale(store) == {"datasets/a/manifest.json": "it is of an earlier content of the FASTA file"}


def test_an_export_of_another_index_is_made_again(store):
    path = store.path / "datasets/a/exports/pt/receipt.json"
    write_json(path, read_json(path) | {"index_sha256": "other"})
    assert list(stale(store)) == ["datasets/a/exports/pt/files.tsv"]


def without_stamps(store) -> None:
    """What earlier versions wrote: no checksums, no stamps, and a plan's inputs written when a run began."""
    for path in store.path.glob("inputs/*/summary.json"):
        kept = {key: value for key, value in read_json(path).items() if key not in ("inputs", "files")}
        path.write_text(json.dumps(kept))
    (store.path / "plan/inputs.json").write_text(json.dumps({name: {"bytes": 1} for name in store.datasets}))
    for path in store.path.glob("datasets/*/manifest.json"):
        path.write_text(json.dumps({key: value for key, value in read_json(path).items() if key != "files"}))


def test_a_store_of_an_earlier_version_is_adopted(store):
    without_stamps(store)
    assert stale(store) == {}
    restore(store.path, wanted(store), store.config)
    assert stale(store) == {}
    assert read_json(store.path / "inputs/a/summary.json")["inputs"] == [input_stamp(store.folder / "a.fasta")]
    assert read_json(store.path / "plan/inputs.json")["settings"] == load(store.path)


def test_another_file_of_that_size_is_not_adopted(store, tmp_path):
    without_stamps(store)
    text = (store.folder / "a.fasta").read_text()
    other = tmp_path / "a.fasta"
    other.write_text(text[:-2] + ("A" if text[-2] != "A" else "C") + text[-1:])
    asked = wanted(store)
    asked = dataclasses.replace(asked, stamps=asked.stamps | {"a": [input_stamp(other)]})
    restore(store.path, asked, store.config)
    assert "inputs/a/records.parquet" in {
        str(path.relative_to(store.path)) for path in stale_outputs(store.path, asked, load(store.path))
    }
