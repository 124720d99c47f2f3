"""`python -m lengthwise verify`."""

import pytest
import torch

import lengthwise
from lengthwise.__main__ import main


@pytest.fixture
def store(small_store, random_proteins):
    store = small_store()
    for name in ("one", "two"):
        store.ingest(name, random_proteins(5, prefix=name))
    store.run()
    return store


def test_an_undamaged_store_is_good(store, capsys):
    assert main(["verify", str(store.path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "weights: good",
        "dataset one: good, 5 records",
        "dataset two: good, 5 records",
    ]


def test_every_damage_gets_a_line(store, capsys):
    (store.path / "datasets/one/manifest.json").write_text("{")
    (shard,) = store.shard_files()
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(store.path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "weights: good"
    assert "--repair" in printed.out
    one, two = printed.err.splitlines()
    assert one.startswith("lengthwise: error: ")
    assert "one/manifest.json" in one
    assert shard.name in two
    assert "is damaged" in two


def test_a_folder_that_is_no_store_is_one_line(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_info_says_what_a_report_of_a_problem_needs(store, capsys):
    (quarantined := store.shard_files()[0].with_suffix(".safetensors.x.damaged")).write_bytes(b"")
    assert main(["info", str(store.path)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "dataset" not in line[:8])
    assert lines["lengthwise"].startswith(lengthwise.__version__)
    assert f"torch {torch.__version__}" in lines["packages"]
    assert lines["device"].startswith("CUDA" if torch.version.cuda else "CPU")
    assert "precision float32" in lines["settings"]
    assert lines["jobs"] == "1 of 1 planned ones are finished"
    assert lines["shards"].startswith("1, ")
    assert lines["quarantine"] == "1 file"
    quarantined.unlink()


def test_info_of_an_unfinished_store_and_of_no_store(store, capsys, tmp_path):
    (store.path / "datasets" / "one" / "manifest.json").unlink()
    assert main(["info", str(store.path)]) == 0
    datasets = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dataset")]
    assert [" ".join(line.split()) for line in datasets] == [
        "dataset one: not finished",
        "dataset two: 5 accepted, 0 duplicate, 0 rejected",
    ]
    assert main(["info", str(tmp_path)]) == 1
    assert "no store here" in capsys.readouterr().err


def test_info_without_a_torch_that_works(capsys, monkeypatch):
    monkeypatch.setattr("lengthwise.maintain.info._ASK_TORCH", "raise ImportError('libcudart.so.12: not found')")
    assert main(["info"]) == 0
    assert "torch cannot be used: ImportError: libcudart.so.12" in capsys.readouterr().out
