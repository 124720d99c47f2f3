"""`python -m lengthwise verify` names every damaged file; after --repair a run makes these again and no others."""

import base64
import hashlib
import json
import os
import re
import resource

import pandas as pd
import pyarrow as pa
import pytest

from lengthwise.__main__ import main
from lengthwise.errors import LengthwiseError
from lengthwise.export.run import export
from lengthwise.maintain.cleanup import broken_job_records
from lengthwise.maintain.verify import check_shard_header
from lengthwise.plan.record import plan_record_path
from lengthwise.store.paths import job_record_path, metrics_path
from lengthwise.store.settings import fingerprint, load
from lengthwise.store.shard import Shard
from lengthwise.system.files import read_json, write_json


@pytest.fixture(scope="module")
def proteins(random_proteins):
    return random_proteins(30)


@pytest.fixture(scope="module")
def finished(small_store, proteins):
    """Two datasets that share half of their sequences, in one job of several shards."""
    store = small_store()
    names = list(proteins)
    store.ingest("one", {name: proteins[name] for name in names[:20]})
    store.ingest("two", {f"other_{name}": proteins[name] for name in names[10:]})
    store.run(shard_bytes=8_000)
    assert len(store.shard_files()) > 3
    return store


@pytest.fixture
def store(finished, tmp_path):
    return finished.copy(tmp_path)


@pytest.fixture
def verify(store, capsys):
    """Runs the command; returns its exit code, the lines on stdout and the error lines."""

    def run(*flags: str) -> tuple[int, list[str], list[str]]:
        code = main(["verify", str(store.path), *flags])
        printed = capsys.readouterr()
        wrong = printed.err.splitlines()
        assert all(line.startswith("lengthwise: error: ") for line in wrong)
        return code, printed.out.splitlines(), wrong

    return run


def flip(path, place: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def place_of(path, tensor: str, row: int = 0) -> int:
    found = Shard(path).tensors[tensor]
    return found.start + row * found.nbytes // found.shape[0]


def run_again(store) -> set[str]:
    """Do what the next plain run does; returns the shards that it made."""
    for job_record in broken_job_records(store.path):
        job_record.unlink()
    made = [job_record["made"] for job_record in store.embed_all()]
    for dataset in store.datasets:
        store.assemble(dataset)
    return {shard for shards in made for shard in shards}


@pytest.mark.parametrize("flags", [[], ["--full"], ["--quick"], ["--repair"]], ids=" ".join)
def test_an_undamaged_store_is_good(verify, store, files_in, flags):
    before = files_in(store.path)
    assert verify(*flags) == (
        0,
        ["weights: good", "dataset one: good, 20 records", "dataset two: good, 20 records"],
        [],
    )
    assert files_in(store.path) == before


def test_a_flipped_bit_names_the_sequence_and_the_records_that_read_it(verify, store, proteins):
    record = list(proteins)[15]  # of both datasets
    sequence = proteins[record].encode()
    row = store.open("one").records.set_index("id").loc[record]
    path = store.shard_path(row["shard"])
    flip(path, place_of(path, "layer_2", int(row["row_start"])))
    name = "SQ." + base64.urlsafe_b64encode(hashlib.sha512(sequence).digest()[:24]).decode()
    code, good, wrong = verify()
    assert (code, good[0]) == (1, "weights: good")
    readers = f"{record} of one, other_{record} of two"
    assert wrong == [f"lengthwise: error: {path}: sequence {row['sequence_no']}, {name}, is damaged; it is {readers}"]


def test_a_damaged_sequence_of_a_shared_shard_is_told_once_with_the_records_that_read_it(verify, store, proteins):
    """Dataset one uses the shard too, for other sequences."""
    two = store.open("two").records.set_index("id")
    shared = set(store.open("one").records["shard"])
    record = next(f"other_{name}" for name in list(proteins)[20:] if two.loc[f"other_{name}", "shard"] in shared)
    path = store.shard_path(two.loc[record, "shard"])
    flip(path, place_of(path, "layer_2", int(two.loc[record, "row_start"])))
    code, said, wrong = verify()
    assert code == 1
    assert len(wrong) == 1
    assert wrong[0].endswith(f"is damaged; it is {record} of two")
    assert said[:2] == ["weights: good", "dataset two: uses damaged files that are named above"]
    store.path.joinpath("datasets/two/index.parquet").unlink()
    assert "no record is known to read it" in verify()[2][0]


def test_five_records_of_a_damaged_sequence_are_named_and_the_rest_counted(small_store, capsys):
    store = small_store()
    store.ingest("a", {f"p{i}": "MKVLAAGIT" for i in range(8)})
    store.run()
    (path,) = store.shard_files()
    flip(path, place_of(path, "layer_2"))
    assert main(["verify", str(store.path)]) == 1
    assert capsys.readouterr().err.endswith(
        "is damaged; it is p0 of a, p1 of a, p2 of a, p3 of a, p4 of a and 3 more\n"
    )


def test_quick_reads_no_embeddings(verify, store, monkeypatch):
    path = store.shard_files()[0]
    flip(path, place_of(path, "layer_2"))
    monkeypatch.setattr(Shard, "damaged", lambda self: pytest.fail("the embeddings were read"))
    assert verify("--quick")[0] == 0


def only(store, pattern: str):
    return sorted(store.path.glob(pattern))[0]


def cut_short(path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def drop_a_record(path) -> None:
    pd.read_parquet(path)[1:].to_parquet(path)


def swap_two_places(path) -> None:
    table = pd.read_parquet(path)
    for column in ("shard", "sequence_no", "row_start"):
        table[column] = [*table[column][1::-1], *table[column][2:]]
    table.to_parquet(path)


def of_an_earlier_version(spoil):
    """Damages a file for which no manifest vouches."""

    def spoil_it(path) -> None:
        for manifest in path.parents[2].glob("datasets/*/manifest.json"):
            content = read_json(manifest)
            content.pop("files", None)
            manifest.write_text(json.dumps(content))
        spoil(path)

    return spoil_it


def edit(**changes):
    return lambda path: write_json(path, read_json(path) | changes)


def edit_settings(path, **changes) -> None:
    """Change settings and their fingerprint."""
    settings = read_json(path) | changes
    write_json(path, settings | {"fingerprint": fingerprint(settings)})


def place_in_lookup(path) -> int:
    """The byte of the first record's row_start."""
    rows = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return path.read_bytes().index(rows["row_start"].chunk(0).buffers()[1].to_pybytes()[: 8 * len(rows)])


def without_places(path) -> None:
    pd.read_parquet(path).assign(sequence_no=None, row_start=None).to_parquet(path)


def other_sizes(path) -> None:
    edit(shards={name: size + 1 for name, size in read_json(path)["shards"].items()})(path)


def other_device(path) -> None:
    manifest = read_json(path)
    edit(settings=manifest["settings"] | {"device": "cuda"})(path)


def other_size(path) -> None:
    sizes = read_json(path)["shards"]
    edit(shards=sizes | {(first := next(iter(sizes))): sizes[first] + 1})(path)


def other_checksum(path) -> None:
    checksums = read_json(path)["checksums"]
    edit(checksums=checksums | {next(iter(checksums)): "0" * 64})(path)


def at(tensor: str, row: int, mask: int = 1):
    return lambda path: flip(path, place_of(path, tensor, row), mask)


SHARD = "shards/*/*.safetensors"
DAMAGES = {
    "shard gone": (SHARD, os.unlink, "missing", "quick"),
    "shard cut short": (SHARD, cut_short, "should have", "quick"),
    "shard empty": (SHARD, lambda path: path.write_bytes(b""), "damaged shard", "quick"),
    "length of the header": (SHARD, lambda path: flip(path, 7), "header claims", "quick"),
    "name of a tensor": (SHARD, lambda path: flip(path, path.read_bytes().index(b"layer_2") + 6), "header", "quick"),
    "fingerprint": (SHARD, lambda path: flip(path, path.read_bytes().index(b'rint":"') + 9), "settings", "quick"),
    "offsets that descend": (SHARD, at("offsets", 1, 0x80), "offsets", "quick"),
    "offsets that ascend": (SHARD, at("offsets", 1), "other rows", "quick"),
    "digest": (SHARD, at("digests", 0), "other sequences", "quick"),
    "status": (SHARD, at("status", 0), "status", "quick"),
    "checksum": (SHARD, at("crc32c", 0), "is damaged", "full"),
    "residue row": (SHARD, at("layer_2", 3), "is damaged", "full"),
    "mean": (SHARD, at("mean_2", 0), "is damaged", "full"),
    "metrics": ("metrics/**/*.parquet", cut_short, "damaged", "quick"),
    "metrics, in a page": ("metrics/**/*.parquet", lambda path: flip(path, 30), "damaged", "full"),
    "parity receipt": ("parity/*.json", cut_short, "damaged", "quick"),
    "job record of other sizes": ("jobs/*.json", other_sizes, "other sizes", "quick"),
    "job record": ("jobs/*.json", cut_short, "damaged", "quick"),
    "job record missing": ("jobs/*.json", os.unlink, "missing", "quick"),
    "index": ("datasets/one/index.parquet", cut_short, "damaged", "quick"),
    "index, in a page": (
        "datasets/one/index.parquet",
        lambda path: flip(path, path.stat().st_size // 5),
        "damaged",
        "quick",
    ),
    "index missing": ("datasets/one/index.parquet", os.unlink, "missing", "quick"),
    "lookup": ("datasets/one/lookup.arrow", cut_short, "damaged", "quick"),
    "lookup of other places": (
        "datasets/one/lookup.arrow",
        lambda path: flip(path, place_in_lookup(path)),
        "damaged",
        "quick",
    ),
    "index of other records": (
        "datasets/one/index.parquet",
        of_an_earlier_version(drop_a_record),
        "other records",
        "quick",
    ),
    "index of other rows": (
        "datasets/one/index.parquet",
        of_an_earlier_version(swap_two_places),
        "not those of its sequences",
        "quick",
    ),
    "index without places": ("datasets/one/index.parquet", of_an_earlier_version(without_places), "damaged", "quick"),
    "manifest": ("datasets/one/manifest.json", cut_short, "damaged", "quick"),
    "manifest of nothing": ("datasets/one/manifest.json", lambda path: path.write_text("{}"), "damaged", "quick"),
    "manifest of lists": ("datasets/one/manifest.json", edit(shards=[], jobs=5), "damaged", "quick"),
    "manifest without a schema": (
        "datasets/one/manifest.json",
        edit(schema=None),
        "damaged (schema is 'None')",
        "quick",
    ),
    "manifest of a schema in words": ("datasets/one/manifest.json", edit(schema="x"), "damaged", "quick"),
    "manifest of counts in words": ("datasets/one/manifest.json", edit(accepted="20"), "damaged", "quick"),
    "manifest of sizes in words": ("datasets/one/manifest.json", edit(shards={"ab" * 16: "5"}), "damaged", "quick"),
    "manifest of another device": ("datasets/one/manifest.json", other_device, "other settings", "quick"),
    "manifest of another size": ("datasets/one/manifest.json", other_size, "bytes of", "quick"),
    "manifest of other checksums": ("datasets/one/manifest.json", other_checksum, "another checksum", "full"),
    "manifest of paths": ("datasets/one/manifest.json", edit(shards={"../../../x": 5}), "damaged", "quick"),
    "manifest of job paths": ("datasets/one/manifest.json", edit(jobs=["../weights"]), "damaged", "quick"),
    "manifest of other counts": ("datasets/one/manifest.json", edit(accepted=19), "other records", "quick"),
    "manifest of other shards": ("datasets/one/manifest.json", edit(shards={}, checksums={}), "other shards", "quick"),
    "manifest of other settings": (
        "datasets/one/manifest.json",
        edit(settings={"fingerprint": "0"}),
        "settings",
        "quick",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_a_run_after_repair_makes_that_file_again_and_no_other(verify, store, damage, files_in):
    pattern, spoil, words, depth = DAMAGES[damage]
    rows, path = store.rows(), only(store, pattern)
    before = {file: file.read_bytes() for file in files_in(store.path)}
    spoil(path)
    if depth == "full":
        assert verify("--quick")[0] == 0
    code, _, wrong = verify(f"--{depth}", "--repair")
    assert code == 0
    assert wrong
    assert all(words in line for line in wrong)
    if damage in ("manifest of other counts", "manifest of other shards"):
        path = path.with_name("index.parquet")  # a run makes the two together
    assert any(str(path) in line or str(path.with_name("lookup.arrow")) in line for line in wrong)
    assert not path.exists()
    made = run_again(store)
    assert made == ({path.stem} if path.suffix == ".safetensors" else set())
    assert store.rows() == rows
    assert verify()[0] == 0
    changed = {file for file, content in before.items() if not file.exists() or file.read_bytes() != content}
    assert {file.stem for file in changed if not {"datasets", "jobs"} & {*file.parts}} <= {path.stem}


def test_identical_messages_are_printed_ten_times_and_then_counted(verify, store, monkeypatch):
    monkeypatch.setattr("lengthwise.maintain.verify_command.MAX_IDENTICAL_MESSAGES", 2)
    for path in store.shard_files():
        path.unlink()
    code, _, wrong = verify("--quick")
    missing = [line for line in wrong if "the shard is missing" in line]
    assert code == 1
    assert len(missing) == 3
    assert re.fullmatch(r"lengthwise: error: and \d+ more files: the shard is missing; restore it.*", missing[-1])


def test_quarantined_files_are_kept(verify, store):
    path = store.shard_files()[0]
    flip(path, place_of(path, "layer_2"))
    spoiled = path.read_bytes()
    code, said, _ = verify("--repair")
    assert code == 0
    assert said[-2:] == [f"in quarantine: {path}.damaged", "run snakemake: it makes the missing files again"]
    assert path.with_name(f"{path.name}.damaged").read_bytes() == spoiled


def test_missing_metrics_are_counted_and_are_no_damage(verify, store):
    only(store, "metrics/**/*.parquet").unlink()
    code, good, wrong = verify()
    assert (code, wrong) == (0, [])
    assert sorted(re.findall("records(.*)", "\n".join(good))) in (
        ["", ", 1 without metrics"],
        [", 1 without metrics"] * 2,
    )


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_bytes(b""), lambda path: flip(path, path.stat().st_size // 2)]
)
def test_damaged_metrics_count_as_missing_once_they_are_in_quarantine(verify, store, spoil):
    spoil(path := only(store, "metrics/**/*.parquet"))
    code, said, wrong = verify()
    assert code == 1
    assert all(str(path) in line for line in wrong)
    assert said[-1].endswith("the next run of snakemake makes them again, but for metrics")
    code, said, _ = verify("--repair")
    assert (code, said[-1]) == (0, "run snakemake: it makes the missing files again, but for metrics")
    code, good, wrong = verify()
    assert (code, wrong) == (0, [])
    assert ", 1 without metrics" in "".join(good)


def test_an_export_of_an_earlier_index_is_noted(verify, store):
    export(store.path / "datasets" / "one", "parquet")
    receipt = store.path / "datasets" / "one" / "exports" / "parquet" / "receipt.json"
    edit(index_sha256="0" * 64)(receipt)
    assert verify()[:2] == (
        0,
        [
            "weights: good",
            "dataset one: good, 20 records, parquet exported from an earlier index",
            "dataset two: good, 20 records",
        ],
    )


def test_no_record_leads_out_of_its_folder(verify, store, files_in):
    """A store may come from somebody else, and --repair renames files."""
    outside = store.path.parent / "outside"
    outside.write_text("mine")
    for name in ("../../../outside", str(outside), "../outside", ".."):
        edit(files={name: {"bytes": 1, "sha256": ""}})(store.path / "inputs" / "one" / "summary.json")
        assert "not names with checksums" in verify()[2][0]
    verify("--repair")
    assert outside.read_text() == "mine"


def test_a_planned_dataset_that_is_not_complete_is_checked_too(verify, store, files_in):
    store.path.joinpath("datasets/two/manifest.json").unlink()
    only_of_two = set(store.open("one").manifest["shards"])
    path = next(path for path in store.shard_files() if path.stem not in only_of_two)
    flip(path, place_of(path, "layer_2"))
    flip(table := store.path / "inputs" / "two" / "records.parquet", 100)
    code, _, wrong = verify("--repair")
    assert code == 0
    assert [line for line in wrong if str(path) in line] != []
    assert [line for line in wrong if str(table) in line] != []
    assert len(wrong) == 2


def test_metrics_where_earlier_versions_had_them_are_checked_too(verify, store):
    for path in store.path.glob("metrics/*/*.parquet"):
        path.rename(path.parent.parent / path.name)
    assert verify()[1][1:] == ["dataset one: good, 20 records", "dataset two: good, 20 records"]
    cut_short(old := only(store, "metrics/*.parquet"))
    code, _, wrong = verify()
    assert code == 1
    assert str(old) in wrong[0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda store: edit(schema=99)(store.path / "datasets/one/manifest.json"), "newer Lengthwise"),
        (lambda store: edit(schema=99)(store.path / "settings.json"), "newer Lengthwise"),
        (lambda store: edit(embed_dim=33)(store.path / "settings.json"), "embed_dim is 33 and 32"),
        (lambda store: edit(device="cuda")(store.path / "settings.json"), "device is cuda and cpu"),
        (lambda store: edit(num_layers=3)(store.path / "weights.json"), "num_layers is 2 and 3"),
        (lambda store: edit_settings(store.path / "settings.json", layers=[1]), "layers is [1] and [2]"),
        (lambda store: edit(bytes=1)(store.path / "weights.json"), "is not the checkpoint"),
    ],
)
def test_problems_that_no_run_can_repair_are_one_line_and_left_alone(verify, store, files_in, spoil, words):
    spoil(store)
    before = files_in(store.path)
    code, _, wrong = verify("--repair")
    assert code == 1
    assert len(wrong) == 1
    assert words in wrong[0]
    assert files_in(store.path) == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (edit(layers=[1]), "edited by hand"),
        (edit(num_layers="2"), "damaged (num_layers is '2')"),
        (edit(embed_dim=None), "damaged (embed_dim is 'None')"),
        (lambda path: path.write_text(""), "damaged"),
        (os.unlink, "is missing"),
    ],
)
def test_damaged_settings_are_named_and_the_rest_is_checked_by_a_copy(verify, store, spoil, words):
    spoil(path := store.path / "settings.json")
    code, good, wrong = verify("--repair")
    assert (code, len(wrong)) == (0, 1)
    assert f"{path}: {words}" in wrong[0]
    assert good[:3] == ["weights: good", "dataset one: good, 20 records", "dataset two: good, 20 records"]
    assert not path.exists()
    write_json(path, load(store.path))  # as the next run does
    assert verify()[0] == 0


def test_without_a_copy_damaged_settings_are_one_line(verify, store):
    for path in (*store.path.glob("datasets/*/manifest.json"), plan_record_path(store.path)):
        path.unlink()
    (store.path / "settings.json").write_text("")
    code, good, wrong = verify("--repair")
    assert (code, good, len(wrong)) == (1, [], 1)
    assert "settings.json: damaged" in wrong[0]


@pytest.mark.parametrize("spoil", [os.unlink, cut_short, lambda path: path.write_text("{}")])
def test_a_lost_record_of_the_weights_is_named_and_the_rest_checked(verify, store, spoil):
    spoil(path := store.path / "weights.json")
    code, good, wrong = verify("--repair")
    assert (code, len(wrong)) == (0, 1)
    assert str(path) in wrong[0]
    assert good[:2] == ["dataset one: good, 20 records", "dataset two: good, 20 records"]
    assert not path.exists()


def test_a_folder_without_a_store_is_one_line(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "no store here" in capsys.readouterr().err


def test_a_failing_disk_is_reported_without_a_crash(verify, store, monkeypatch):
    """Through a memory map a read error would end the process by a signal."""
    import numpy as np

    bad = store.shard_files()[0]
    original = np.fromfile

    def failing(file, dtype, n):
        if file.name == str(bad) and n > 1000:
            raise OSError(5, "Input/output error")
        return original(file, dtype, n)

    monkeypatch.setattr(np, "fromfile", failing)
    code, _, wrong = verify()
    assert code == 1
    assert all(f"{bad}: cannot be read: [Errno 5] Input/output error" in line for line in wrong)


def test_shards_that_cannot_be_opened_are_not_quarantined(verify, store, monkeypatch, files_in):
    before, original = files_in(store.path), Shard.__init__

    def refuse(self, path):
        try:
            raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise LengthwiseError(f"{path}: cannot be read: {error.strerror}") from error

    monkeypatch.setattr(Shard, "__init__", refuse)
    code, _, wrong = verify("--repair")
    assert code == 1
    assert all("Permission denied" in line for line in wrong)
    monkeypatch.setattr(Shard, "__init__", original)
    assert files_in(store.path) == before


def test_a_store_may_have_more_shards_than_a_process_may_open_files(verify, store):
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert verify()[0] == 0  # files that are opened once are open now
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 6, hard))
    try:
        assert len(store.shard_files()) > 6
        assert verify() == (0, ["weights: good", "dataset one: good, 20 records", "dataset two: good, 20 records"], [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_offsets_of_pooled_vectors_are_checked_too(small_store, random_proteins, capsys):
    """Without per-residue rows no checksum covers the offsets."""
    store = small_store(outputs=["mean"])
    store.ingest("a", random_proteins(10))
    store.run()
    (path,) = store.shard_files()
    flip(path, place_of(path, "offsets", 3))
    assert Shard(path).damaged() == []
    assert main(["verify", str(store.path), "--quick"]) == 1
    assert capsys.readouterr().err.count("other rows") == 2


@pytest.mark.parametrize("every_bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_single_flipped_bit_goes_unnoticed(small_store, random_proteins, every_bit):
    """One bit of each byte, or every one, of the header and the small tensors, and of some others."""
    store = small_store(outputs=["residue", "mean"])
    store.ingest("a", random_proteins(3, longest=6))
    store.run()
    (path,) = store.shard_files()
    content = path.read_bytes()
    shard = Shard(path)
    text_ends = content.index(b"  ", 8)
    first = min(tensor.start for tensor in shard.tensors.values())
    harmless = content.index(b'"format":"pt"')  # no code reads it
    unnoticed = []
    places = [*range(text_ends + 16), *range(text_ends + 16, first, 512), *range(first, len(content), 7)]
    places += range(shard.tensors["offsets"].start, len(content))
    flipped = path.with_name("flipped") / path.name
    flipped.parent.mkdir()
    for place in places:
        for bit in range(8) if every_bit else [place % 8]:
            flipped.write_bytes(content)
            with open(flipped, "r+b") as file:
                file.seek(place)
                file.write(bytes([content[place] ^ (1 << bit)]))
            try:
                noticed = check_shard_header(flipped, store.settings).damaged() != []
            except LengthwiseError:
                noticed = True
            if not noticed and not harmless <= place < harmless + len(b'"format":"pt"'):
                unnoticed.append((place, bit))
    assert unnoticed == []


def test_the_table_of_damages_finds_the_job_record_and_the_metrics(store):
    job = store.jobs["job"].iloc[0]
    assert job_record_path(store.path, job) == only(store, "jobs/*.json")
    assert metrics_path(store.path, store.shard_files()[0].stem) in store.path.glob("metrics/**/*.parquet")
