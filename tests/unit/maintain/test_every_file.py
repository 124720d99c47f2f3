"""Every file of a store: emptied, cut in half or with a flipped byte it is named by verify and moved aside by --repair."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from lengthwise.export.run import export
from lengthwise.maintain.quarantine import Problem, quarantine
from lengthwise.maintain.verify import verify
from lengthwise.report.study import measure
from lengthwise.report.summarize import summarize
from lengthwise.store.paths import QUARANTINE_ENDING

KINDS = ("h5", "pt", "biotrainer", "parquet")
# No code reads this part of a shard's header.
UNREAD = b'"format":"pt"'


@pytest.fixture(scope="module")
def full(small_store, random_proteins, tmp_path_factory):
    """A store with everything in it: two datasets that share sequences, every export, a report with a study."""
    store = small_store()
    proteins = random_proteins(8)
    names = list(proteins)
    store.ingest("one", {name: proteins[name] for name in names[:6]} | {"rejected": "MK1"})
    store.ingest("two", {f"other_{name}": proteins[name] for name in names[3:]})
    store.run(shard_bytes=4_000, job_seconds=1e-5)
    folders = {name: store.path / "datasets" / name for name in store.datasets}
    for folder in folders.values():
        for kind in KINDS:
            export(folder, kind)
    scaling = store.path / "report" / "scaling.tsv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.LENGTHS, "cpu", (50, 100))
        measure.scaling(store.config["model"], "cpu", "float32", scaling, seconds=2.0)
    manifests = {name: folder / "manifest.json" for name, folder in folders.items()}
    summarize(store.path, store.jobs_tsv, manifests, scaling, scaling.parent)
    assert len(store.shard_files()) > 2
    assert len(store.jobs) > 2
    return store.path


@pytest.fixture
def store(full, tmp_path):
    return shutil.copytree(full, tmp_path / "store")


def emptied(content: bytes) -> bytes:
    return b""


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(share: float):
    """Flips a byte at this share of the file."""

    def flip(content: bytes) -> bytes:
        place = int(share * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flip


def is_harmless(path: Path, content: bytes, damaged: bytes) -> bool:
    """Whether nothing that reads the file can see the damage."""
    if path.suffix == ".json":
        with suppress(ValueError):
            return json.loads(content) == json.loads(damaged)
    start = content.find(UNREAD) if path.suffix == ".safetensors" else -1
    return damaged == content or (start >= 0 and damaged[:start] + UNREAD + damaged[start + len(UNREAD) :] == content)


# What one record vouches for is in another category than the record.
CATEGORIES = {
    "settings": "settings.json",
    "weights": "weights.json",
    "tables of inputs": "inputs/*/*.parquet",
    "summaries of inputs": "inputs/*/*.json",
    "plan": "plan/jobs.tsv",
    "work orders": "plan/jobs/*",
    "record of the plan": "plan/*.json",
    "job records": "jobs/*",
    "metrics": "metrics/*/*",
    "shards": "shards/*/*",
    "parity": "parity/*",
    "files of datasets": "datasets/*/*[!n]",
    "manifests": "datasets/*/*.json",
    "exports": "datasets/*/exports/*/*.[!pj]*",
    "pooled vectors": "datasets/*/exports/*/*.parquet",
    "proteins of exports": "datasets/*/exports/pt/*.pt",
    "receipts of exports": "datasets/*/exports/*/*.json",
    "report": "report/*[!n]",
    "receipt of the report": "report/*.json",
}
DAMAGES = {"emptied": emptied, "halved": halved, "flipped": flipped(0.5)}


def test_every_file_is_in_a_category(full, files_in):
    found = [path for pattern in CATEGORIES.values() for path in full.glob(pattern) if path.is_file()]
    assert sorted(found) == files_in(full)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("category", CATEGORIES)
def test_damage_of_all_files_of_a_kind_is_named_and_moved_aside(store, category, damage):
    paths = [path for path in store.glob(CATEGORIES[category]) if path.is_file()]
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(DAMAGES[damage](content))
        assert not is_harmless(path, content, path.read_bytes())
    problems = problems_of(store)
    assert {problem.path for problem in problems} == {*paths}
    assert all(str(problem.path) in problem.message for problem in problems)
    assert {path.name for path in quarantine(problems)} == {f"{path.name}{QUARANTINE_ENDING}" for path in paths}
    assert not any(path.exists() for path in paths)
    if damage == "emptied":
        again = problems_of(store)
        assert {problem.path for problem in again} <= {*paths}
        assert all("missing" in problem.message for problem in again)


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("emptied", "halved", 0.4, 1.0)),
        *(pytest.param(share, marks=pytest.mark.huge) for share in (0.0, 0.2, 0.6, 0.8, 0.999)),
    ],
)
def test_damage_of_each_file_is_named_and_it_alone_is_moved_aside(store, files_in, damage):
    harm = DAMAGES.get(damage) or flipped(damage)
    for path in files_in(store):
        content = path.read_bytes()
        path.write_bytes(harm(content))
        if is_harmless(path, content, path.read_bytes()):
            continue
        problems = problems_of(store)
        assert [problem for problem in problems if str(path) not in problem.message] == []
        assert [moved.name for moved in quarantine(problems)] == [f"{path.name}{QUARANTINE_ENDING}"]
        path.with_name(f"{path.name}{QUARANTINE_ENDING}").unlink()
        path.write_bytes(content)
    assert problems_of(store) == []


def problems_of(store: Path) -> list[Problem]:
    return [problem for result in verify(store) for problem in result.problems]
