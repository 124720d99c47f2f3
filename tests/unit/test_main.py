"""`python -m lengthwise verify`."""

import pytest

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
