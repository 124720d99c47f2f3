"""Long proteins: whole, rejected, truncated or in windows, against a loop over fair-esm."""

import hashlib
import random

import duckdb
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import lengthwise.config
from fair_esm import assert_close
from lengthwise.__main__ import main
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.tokens import STANDARD
from lengthwise.export.run import export
from lengthwise.report.pca import principal_components, project
from lengthwise.store.shard import Shard
from lengthwise.store.windows import Windows
from small_store import ROOT

SIZE, OVERLAP = 60, 20
WINDOWS = {"long_policy": "window", "window_residues": SIZE, "overlap": OVERLAP}


def protein(length: int, seed: int = 0) -> str:
    return "".join(random.Random(f"{length} {seed}").choices(STANDARD.decode(), k=length))


LONG = protein(5_000)
ISOFORM = LONG[:SIZE] + protein(90)  # its first window is LONG's
PROTEINS = {
    "short": protein(40),
    "one_window": LONG[:SIZE],  # and LONG's first one
    "one_more": protein(SIZE + 1),
    "long": LONG,
    "twin": LONG,
    "isoform": ISOFORM,
    "last": protein(SIZE + OVERLAP),
}


@pytest.fixture(scope="module")
def fair_esm(tiny_checkpoint):
    """Embeds one sequence by fair-esm: [L, D] of layers 1 and 2."""
    model = checkpoint.reference_model(tiny_checkpoint)

    def embed(sequence: str) -> dict[int, np.ndarray]:
        _, _, tokens = model.alphabet.get_batch_converter()([("", sequence)])
        with torch.inference_mode():
            found = model(tokens, repr_layers=[1, 2])["representations"]
        return {layer: value[0, 1:-1].numpy() for layer, value in found.items()}

    return embed


def in_windows(embed, sequence: str) -> dict[int, np.ndarray]:
    """Each residue's row from the window in whose middle it is most, of two the first."""
    if len(sequence) <= SIZE:
        return embed(sequence)
    starts = [start for start in range(0, len(sequence), SIZE - OVERLAP) if start + SIZE < len(sequence)]
    starts.append(len(sequence) - SIZE)
    windows = [embed(sequence[start : start + SIZE]) for start in starts]
    rows = {1: [], 2: []}
    for i in range(len(sequence)):
        distances = [abs(i - (start + (SIZE - 1) / 2)) for start in starts]
        nearest = int(np.argmin(distances))
        for layer, own in rows.items():
            own.append(windows[nearest][layer][i - starts[nearest]])
    return {layer: np.stack(own) for layer, own in rows.items()}


@pytest.fixture(scope="module")
def reference(fair_esm):
    return {name: in_windows(fair_esm, sequence) for name, sequence in PROTEINS.items()}


@pytest.fixture(scope="module")
def store(small_store):
    made = small_store(layers=[1, -1], storage_dtype="float32")
    made.ingest("a", PROTEINS, **WINDOWS)
    made.run(shard_bytes=100_000)
    assert len(made.shard_files()) > 3
    return made


@pytest.fixture
def ds(store):
    return store.open("a")


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", PROTEINS)
def test_row_i_is_residue_i_from_the_window_in_whose_middle_it_is_most(ds, reference, name, layer):
    assert_close(ds.layer(layer)[name], reference[name][layer])


def test_all_ways_of_reading_give_the_same_rows(ds):
    assert ds.ids == list(PROTEINS)
    for name, rows in ds.in_storage_order():
        np.testing.assert_array_equal(rows, ds[name])
    np.testing.assert_array_equal(ds.torch()[3][1].numpy(), ds["long"])
    assert ds.verify() == len(PROTEINS)
    assert ds[["long", "short", "isoform"]].frame().index.tolist() == ["long", "short", "isoform"]


def test_sequences_are_the_whole_ones(ds):
    assert {name: ds.sequence(name) for name in PROTEINS} == PROTEINS
    assert ds.where(f"sequence LIKE '%{PROTEINS['isoform'][-40:]}'").ids == ["isoform"]


@pytest.mark.parametrize("kind", ["max", "std"])
def test_what_was_not_stored_is_computed_from_the_joined_rows(ds, kind):
    found = ds.pooled(kind)
    for vector, name in zip(found, PROTEINS, strict=True):
        np.testing.assert_allclose(vector, getattr(ds[name].astype(np.float64), kind)(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_mean_is_that_of_the_joined_rows(ds, reference, layer):
    assert_close(ds.layer(layer).pooled(), np.stack([reference[name][layer].mean(0) for name in PROTEINS]))


def test_every_window_is_computed_once(store):
    (sequences,) = (
        duckdb.sql(f"SELECT sequence FROM read_parquet('{store.inputs('a') / 'sequences.parquet'}')")
        .fetchnumpy()
        .values()
    )
    found = [bytes(sequence).decode() for sequence in sequences]
    assert sorted(found) == sorted(set(found))
    assert PROTEINS["one_window"] in found
    assert max(map(len, found)) == SIZE
    assert sum(store.jobs["residues"]) == sum(map(len, found))
    assert sum(store.jobs["residues"]) < sum(
        len(s) if len(s) <= SIZE else SIZE * -(-(len(s) - OVERLAP) // (SIZE - OVERLAP)) for s in PROTEINS.values()
    )


def test_another_policy_touches_only_the_records_that_it_concerns(store, small_store, tmp_path, fair_esm):
    changed, before = store.copy(tmp_path), {path.name: path.stat().st_mtime_ns for path in store.shard_files()}
    changed.ingest("a", PROTEINS, long_policy="full")
    changed.run()
    new = {path.name: path for path in changed.shard_files() if path.name not in before}
    assert {path.name for path in changed.shard_files()} >= before.keys()
    assert sum(changed.work_order(job)["length"].sum() for job in changed.jobs["job"]) < 2 * sum(
        map(len, PROTEINS.values())
    )
    ds = changed.open("a")
    for name, sequence in PROTEINS.items():
        assert_close(ds[name], fair_esm(sequence)[1 if ds._layer == 1 else 2])
    assert not (changed.path / "datasets" / "a" / "windows.arrow").exists()
    shorter = {path.stem for path in store.shard_files()}
    assert new
    assert {*ds.manifest["shards"]} & shorter, "short proteins stay where they are"

    changed.ingest("a", PROTEINS, **WINDOWS)  # and back: nothing is left to compute
    changed.plan()
    assert [job for job in changed.jobs["job"] if not (changed.path / "jobs" / f"{job}.json").exists()] == []
    changed.assemble("a")
    np.testing.assert_array_equal(changed.open("a")["long"], store.open("a")["long"])


def test_truncated_proteins_are_recorded_with_both_lengths(small_store, fair_esm):
    made = small_store(storage_dtype="float32")
    proteins = {
        "a": protein(100),
        "b": "X" * 30 + protein(20),
        "same": protein(100)[:30] + protein(9),
        "c": protein(30),
    }
    summary = made.ingest("a", proteins | {"stop": protein(29) + "j*"}, long_policy="truncate", max_residues=30)
    made.run()
    ds = made.open("a")
    assert ds.records.set_index("id")["length"].to_dict() == {"a": 30, "b": 50, "same": 30, "c": 30, "stop": 30}
    full = ds.records.set_index("id")["full_length"].dropna().astype(int).to_dict()
    assert full == {"a": 100, "same": 39}
    assert ds.records.set_index("id")["status"].to_dict() == {
        "a": "accepted",
        "b": "rejected",  # nothing but X is left
        "same": "duplicate",
        "c": "accepted",
        "stop": "accepted",
    }
    assert summary["changes"]["truncated"] == 2
    assert_close(ds["same"], fair_esm(protein(100)[:30])[2])


def test_a_window_whose_numbers_overflow_rejects_its_protein(small_store, tmp_path):
    made = small_store()
    made.ingest("a", {"long": protein(100), "short": protein(10)}, **WINDOWS)
    made.plan()
    made.embed_all()
    for path in made.shard_files():
        spoil_first_long_sequence(path)
    manifest = made.assemble("a")
    assert manifest["reasons"] == {"non_finite": 1}
    ds = made.open("a")
    assert ds.ids == ["short"]
    with pytest.raises(KeyError, match="non_finite"):
        ds["long"]


def spoil_first_long_sequence(path):
    shard = Shard(path)
    numbers = np.flatnonzero(np.diff(shard["offsets"]) == SIZE)
    if len(numbers):
        with open(path, "r+b") as file:
            file.seek(shard.tensors["status"].start + int(numbers[0]))
            file.write(b"\x01")


def test_exports_have_the_joined_rows(store, ds):
    folder = store.path / "datasets" / "a"
    for kind in ("h5", "pt", "biotrainer", "parquet"):
        assert export(folder, kind) == len(ds)
    with h5py.File(folder / "exports" / "biotrainer" / "embeddings_file_tiny.h5") as file:
        for name, sequence in PROTEINS.items():  # by the key that biotrainer computes of a sequence
            key = hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()
            np.testing.assert_array_equal(file[key][:], ds[name])
    vectors = pq.read_table(folder / "exports" / "parquet" / "pooled.parquet").column("mean_2").combine_chunks()
    np.testing.assert_array_equal(vectors.values.to_numpy().reshape(len(ds), -1), ds.layer(2).pooled())
    for name in PROTEINS:
        saved = torch.load(folder / "exports" / "pt" / f"{name}.pt", weights_only=True)["representations"][1]
        np.testing.assert_array_equal(saved.numpy(), ds.layer(1)[name])


def test_verify_knows_whose_windows_are_damaged(store, tmp_path, capsys):
    copied = store.copy(tmp_path)
    assert main(["verify", str(copied.path)]) == 0
    windows = Windows(copied.path / "datasets" / "a").flat().to_pandas()
    window = windows[windows["protein"].map(lambda protein: (windows["protein"] == protein).sum()) > 100].iloc[50]
    shard = Shard(copied.shard_path(window["shard"]))
    with open(shard.path, "r+b") as file:
        file.seek(shard.tensors["layer_2"].start + 4 * 32 * int(window["row_start"]))
        file.write(b"\xff\xff")
    capsys.readouterr()
    assert main(["verify", str(copied.path)]) == 1
    wrong = capsys.readouterr().err
    assert "long of a, twin of a" in wrong
    assert wrong.count("\n") == 1, wrong
    (copied.path / "datasets" / "a" / "windows.arrow").write_bytes(b"")
    assert main(["verify", str(copied.path)]) == 1
    assert "windows.arrow" in capsys.readouterr().err


def test_the_map_has_the_joined_means(store, ds):
    manifests = {"a": store.path / "datasets" / "a" / "manifest.json"}
    projection, why = project(store.path, store.settings | {"random_weights": False}, manifests)
    assert why == ""
    named = projection.records.set_index("id")
    accepted = ds[[name for name in PROTEINS if name != "twin"]]
    components, _ = principal_components(accepted.pooled().astype(float))
    np.testing.assert_allclose(named.loc[list(accepted.ids), ["pc1", "pc2"]], components, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"long_sequences": {"policy": "window", "overlap": 1022}}, ["overlap", "1022", "window_residues"]),
        ({"long_sequences": {"policy": "window", "window_residues": 50, "overlap": 60}}, ["overlap: 60", "50"]),
        ({"long_sequences": {"policy": "window"}, "outputs": ["residue", "bos"]}, ["bos", "windows", "outputs"]),
        ({"long_sequences": {"policy": "window"}, "outputs": ["mean"]}, ["mean", "residue"]),
    ],
)
def test_what_cannot_be_in_windows_is_refused(config, words, refused):
    with refused(*words):
        lengthwise.config.validate(
            {"inputs": ["a.fasta"], "model": "demo", **config}, ROOT / "workflow" / "schemas" / "config.schema.yaml"
        )


def test_windows_share_a_quarter_unless_the_config_says_otherwise():
    config = lengthwise.config.validate(
        {"inputs": ["a.fasta"], "model": "demo", "long_sequences": {"policy": "window", "window_residues": 400}},
        ROOT / "workflow" / "schemas" / "config.schema.yaml",
    )
    assert config["long_sequences"]["overlap"] == 100
