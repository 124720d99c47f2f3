"""Provenance: a manifest and a README that say what made the numbers, and how to read them."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lengthwise.jobs import embed_job
from lengthwise.store import provenance, weights
from lengthwise.store.paths import job_record_path
from lengthwise.store.shard import Shard
from lengthwise.system import versions
from lengthwise.system.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def finished(small_store, random_proteins):
    store = small_store(layers=[-1, 0], outputs=["residue", "mean", "bos"])
    store.ingest("a", {**random_proteins(20), "twice": random_proteins(20)["p0"], "bad": "MK1", "lower": "mkv"})
    store.run(shard_bytes=8_000)
    return store, store.path / "datasets" / "a"


def test_a_manifest_says_what_made_the_numbers(finished):
    store, folder = finished
    manifest = read_json(folder / "manifest.json")
    assert manifest["settings"] == store.settings
    assert manifest["weights"] == {"sha256": store.settings["weights_sha256"], "origin": store.config["model"]}
    assert manifest["input_sha256"] == hashlib.sha256((store.folder / "a.fasta").read_bytes()).hexdigest()
    assert manifest["policy"]["letters"]["lowercase"] == "uppercase"
    assert manifest["policy"]["max_residues"] == 1022
    assert manifest["changes"] == {"uppercased": 1}
    (maker,) = manifest["made_by"]
    assert maker["jobs"] == manifest["jobs"]
    assert maker["versions"]["torch"] == torch.__version__
    assert set(maker["versions"]) == {"lengthwise", "git", "python", "torch", "cuda", "driver"}
    assert maker["parity"]["stored"]["share_of_limit"] < 1
    assert [maker["device"]] == manifest["devices"]


def test_a_shards_checksum_is_that_of_its_offsets_and_crc32c(finished):
    store, folder = finished
    checksums = read_json(folder / "manifest.json")["checksums"]
    assert checksums.keys() == read_json(folder / "manifest.json")["shards"].keys()
    for shard, checksum in checksums.items():
        tensors = load_file(store.shard_path(shard))
        assert hashlib.sha256(tensors["offsets"].tobytes() + tensors["crc32c"].tobytes()).hexdigest() == checksum


def test_every_device_and_version_is_in_the_manifest(small_store, random_proteins, monkeypatch):
    store = small_store()
    store.ingest("a", random_proteins(20))
    jobs = store.plan(job_seconds=1e-9)["job"].tolist()
    store.embed(jobs[0])
    monkeypatch.setattr(embed_job, "versions", lambda: {"torch": "9.9", "cuda": "13.0", "driver": "580.1"})
    store.embed_all()
    made_by = store.assemble("a")["made_by"]
    assert [maker["versions"].get("driver") for maker in made_by] == [None, "580.1"]
    assert [maker["jobs"] for maker in made_by] == [jobs[:1], jobs[1:]]
    readme = (store.path / "datasets" / "a" / "README.md").read_text()
    assert "- 1 job on" in readme
    assert f"- {len(jobs) - 1} jobs on" in readme
    assert "driver 580.1" in readme


def test_the_readmes_python_reads_the_first_protein(finished, monkeypatch):
    store, folder = finished
    ds = store.open("a")
    text = (folder / "README.md").read_text()
    lengthwise_way, plain_way = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(plain_way, found)
    assert np.array_equal(found["rows"], ds[0])
    assert np.array_equal(found["mean"], ds.pooled("mean")[0])
    assert np.array_equal(found["bos"], ds.pooled("bos")[0])
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        exec(lengthwise_way, found)
    assert len(found["ds"]) == 22


def test_a_readme_says_what_is_there_and_where_it_is_from(finished):
    store, folder = finished
    text = (folder / "README.md").read_text()
    counts = (
        "records in the input | 23",
        "embedded | 21",
        "whose rows they share | 1",
        "not embedded, `rejected.tsv` says why | 1",
    )
    for part in (
        *counts,
        "RANDOM WEIGHTS",
        store.settings["weights_sha256"],
        "float16",
        "fair-esm",
        "lowercase uppercase",
    ):
        assert part in text, part
    config = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    assert f"model: {json.dumps(store.config['model'])}" in config


def test_means_alone_have_a_readme_without_rows(small_store, random_proteins, monkeypatch):
    store = small_store(outputs=["mean"])
    store.ingest("a", random_proteins(5))
    store.run()
    text = (store.path / "datasets" / "a" / "README.md").read_text()
    assert "layer_2" not in text
    assert "ds[ds.ids" not in text
    monkeypatch.chdir(store.path / "datasets" / "a")
    found: dict = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], found)
    assert np.array_equal(found["mean"], store.open("a").pooled("mean")[0])


def test_stores_of_earlier_versions_are_assembled(finished):
    store, folder = finished
    job_record = job_record_path(store.path, read_json(folder / "manifest.json")["jobs"][0])
    summary = store.inputs("a") / "summary.json"
    kept = job_record.read_text(), summary.read_text()
    try:
        write_json(job_record, {key: value for key, value in read_json(job_record).items() if key != "parity"})
        write_json(summary, {key: value for key, value in read_json(summary).items() if key != "policy"})
        manifest = store.assemble("a")
        text = (folder / "README.md").read_text()
    finally:
        job_record.write_text(kept[0])
        summary.write_text(kept[1])
    assert (manifest["policy"], manifest["made_by"][0]["parity"]) == (None, None)
    assert "not compared with fair-esm" in text


def test_a_readme_holds_odd_names_in_code_spans(finished):
    manifest = read_json(finished[1] / "manifest.json")
    text = provenance.readme({**manifest, "input": "in/`rm -rf`\n# big.fasta"})
    assert "`in/'rm -rf' # big.fasta`" in text


def test_a_checkout_is_named_by_its_commit():
    if not (ROOT / ".git").exists():
        assert versions.git_commit() is None
        return
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(versions.git_commit().removesuffix("-dirty"))


def test_a_checkout_is_dirty_where_its_code_is_edited_and_not_its_config(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)

    code, config = tmp_path / "scripts" / "lengthwise" / "system" / "versions.py", tmp_path / "config" / "config.yaml"
    for path, text in ((code, Path(versions.__file__).read_text()), (config, "a: 1")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    ask = "import runpy; print(runpy.run_path('scripts/lengthwise/system/versions.py')['git_commit']())"
    found = []
    for path in (None, config, code):
        if path:
            path.write_text(path.read_text() + "\n")
        found.append(
            subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
        )
    assert found[0] == found[1]
    assert found[2] == f"{found[0]}-dirty"


def test_a_checksum_changes_with_any_sequence(finished, tmp_path):
    store, _ = finished
    shard = Shard(shutil.copy(store.shard_files()[0], tmp_path))
    before = provenance.content_sha256(shard)
    with open(shard.path, "r+b") as file:
        file.seek(shard.tensors["crc32c"].start)
        file.write(bytes([shard["crc32c"].tobytes()[0] ^ 1]))
    assert provenance.content_sha256(shard) != before


@pytest.mark.parametrize(
    ("model", "origin"),
    [
        ("esm2_t6_8M_UR50D", "https://example.org/models/w.pt"),
        ("demo", "made on the spot, seeded and random"),
        ("mine/w.pt", "mine/w.pt"),
    ],
)
def test_weights_are_said_to_be_from_where_they_came(tmp_path, model, origin):
    write_json(tmp_path / "weights.json", {"model": model, "path": "weights/w.pt"})
    if origin.startswith("https"):
        write_json(tmp_path / "weights" / "w.pt.json", {"url": origin})
    assert weights.origin(tmp_path) == origin
