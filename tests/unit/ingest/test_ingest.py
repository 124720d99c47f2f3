"""Ingest against Biopython's parse of the same files, its tables read with DuckDB; what is no FASTA leaves nothing."""

import bz2
import gzip
import io
import lzma
import random
import zipfile

import duckdb
import pytest
from Bio import SeqIO
from esm.data import Alphabet

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import tokens
from lengthwise.ingest import digests as digests_module
from lengthwise.ingest import judge
from lengthwise.ingest.identity import input_stamp
from lengthwise.ingest.ingest import ingest
from lengthwise.ingest.judge import Policy
from lengthwise.ingest.normalize import Letters
from lengthwise.system.files import read_json, sha256
from realistic import write

MIXED = (
    b">sp|P1|ONE first  protein\nMKVLA\nWWC\n"
    b">two\nmkvj*\n"
    b">three same as the first\nMKVLAWWC\n"
    b">four\nMK-V\n"
    b">five\n\n"
    b">six\nACDE \n\nFG\n"
    b">two\nMKVX\n"
)


@pytest.fixture
def run(tmp_path):
    """Ingests bytes; returns (records, sequences, summary), the tables as lists of dicts."""

    def ingest_bytes(data: bytes, name: str = "in.fasta", **options):
        fasta, folder = tmp_path / name, tmp_path / "out"
        fasta.write_bytes(data)
        paths = [folder / "records.parquet", folder / "sequences.parquet", folder / "summary.json"]
        stamp = input_stamp(fasta) | {"path": "in.fasta"}  # the same path: each file takes the place of the one before
        summary = ingest(fasta, *paths, Policy(**options), stamps=[stamp])
        assert read_json(paths[2]) == summary
        tables = [duckdb.sql(f"FROM '{path}'").to_arrow_table().to_pylist() for path in paths[:2]]
        return *tables, summary

    return ingest_bytes


def column(table: list[dict], name: str) -> list:
    return [row[name] for row in table]


def test_every_record_of_biopython_is_there_in_its_order(run, random_proteins):
    proteins = random_proteins(200, longest=200)
    text = "".join(f">{name} of {name}\n{sequence[:60]}\n{sequence[60:]}\n" for name, sequence in proteins.items())
    records, sequences, _ = run(text.encode())
    parsed = list(SeqIO.parse(io.StringIO(text), "fasta"))
    assert column(records, "record_no") == list(range(1, len(parsed) + 1))
    assert column(records, "id") == [record.id for record in parsed]
    assert [f"{row['id']} {row['description']}" for row in records] == [record.description for record in parsed]
    assert column(records, "length") == [len(record) for record in parsed]
    assert column(sequences, "sequence") == [bytes(record.seq) for record in parsed]


def test_every_sequence_has_its_digest_and_length(run, random_proteins, digest_of):
    records, sequences, _ = run("".join(f">{n}\n{s}\n" for n, s in random_proteins(50).items()).encode())
    assert column(records, "digest") == column(sequences, "digest")
    for row in sequences:
        assert row["digest"] == digest_of(row["sequence"].decode())
        assert row["length"] == len(row["sequence"])


def test_every_record_has_one_fate_with_its_reason(run):
    records, sequences, _ = run(MIXED)
    assert column(records, "status") == [
        "accepted",
        "accepted",
        "duplicate",
        "rejected",
        "rejected",
        "accepted",
        "duplicate",
    ]
    assert column(records, "reason") == [
        "",
        "",
        "",
        "invalid_byte: '-' (0x2D) at position 3",
        "empty",
        "",
        "",
    ]
    assert column(records, "changes") == ["", "uppercased,stop_stripped,j_to_x", "", "", "", "", ""]
    assert column(sequences, "sequence") == [b"MKVLAWWC", b"MKVX", b"ACDEFG"]
    assert [row["digest"] is None for row in records] == [row["status"] == "rejected" for row in records]


def test_a_space_inside_a_line_is_removed_and_flagged_and_one_at_its_end_is_nothing(run):
    records, sequences, _ = run(b">one\nMKV\nLA WW\n>two\nMKV \t\n")
    assert column(records, "changes") == ["spaces_removed", ""]
    assert column(sequences, "sequence") == [b"MKVLAWW", b"MKV"]


def test_a_duplicate_has_the_digest_of_the_record_it_repeats(run):
    records, _, _ = run(MIXED)
    digests = column(records, "digest")
    assert digests[2] == digests[0]
    assert digests[6] == digests[1]


def test_the_counts_add_up(run, tmp_path):
    records, sequences, summary = run(MIXED)
    assert {key: summary[key] for key in ("records", "accepted", "duplicate", "rejected")} == {
        "records": 7,
        "accepted": 3,
        "duplicate": 2,
        "rejected": 2,
    }
    assert len(records) == summary["accepted"] + summary["duplicate"] + summary["rejected"]
    assert len(sequences) == summary["accepted"]
    assert summary["residues"] == sum(column(sequences, "length"))
    assert summary["reasons"] == {"invalid_byte": 1, "empty": 1}
    assert summary["changes"] == {"uppercased": 1, "stop_stripped": 1, "j_to_x": 1}
    fasta = tmp_path / "in.fasta"
    assert (summary["input_bytes"], summary["input_sha256"]) == (fasta.stat().st_size, sha256(fasta))


def test_a_record_without_an_id_is_rejected(run):
    records, _, summary = run(b">\nMKV\n>a\nMK\n> \nAC\n")
    assert column(records, "status") == ["rejected", "accepted", "rejected"]
    assert summary["reasons"] == {"no_id": 2}


def test_more_records_than_a_row_group_are_all_there(run, monkeypatch, random_proteins):
    monkeypatch.setattr("lengthwise.ingest.tables.ROWS_PER_GROUP", 7)
    proteins = random_proteins(50)
    records, sequences, _ = run("".join(f">{n}\n{s}\n" for n, s in proteins.items()).encode())
    assert column(records, "id") == list(proteins)
    assert column(sequences, "sequence") == [sequence.encode() for sequence in proteins.values()]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:]), id="gzip-of-two-members"),
        pytest.param(lambda data: b"\xef\xbb\xbf" + data, id="byte-order-mark"),
        pytest.param(lambda data: gzip.compress(b"\xef\xbb\xbf" + data), id="byte-order-mark-in-gzip"),
        pytest.param(lambda data: data.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(lambda data: data.replace(b"\n", b"\r"), id="CR"),
        pytest.param(lambda data: data.rstrip(b"\n"), id="no-final-newline"),
        pytest.param(lambda data: b"\n \n" + data, id="blank-lines-first"),
    ],
)
@pytest.mark.parametrize("name", ["in.fasta", "in.fasta.gz"])
def test_the_same_records_come_out_however_they_are_packed(run, change, name):
    assert run(change(MIXED), name)[:2] == run(MIXED, "plain.fasta")[:2]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param("MKé".encode(), "invalid_byte: (0xC3) at position 3", id="utf-8"),
        pytest.param(b"MK\xe9", "invalid_byte: (0xE9) at position 3", id="latin-1"),
        pytest.param(b"MK\x00", "invalid_byte: (0x00) at position 3", id="nul"),
    ],
)
def test_bytes_that_are_no_text_reject_their_record_alone(run, raw, reason):
    records, _, _ = run(b">a\n" + raw + b"\n>b\nMK\n")
    assert column(records, "reason") == [reason, ""]


def test_one_id_for_two_sequences_is_refused_naming_both(run, refused, tmp_path, files_in):
    with refused("in.fasta", "records 1 and 3", "'a'"):
        run(b">a x\nMKV\n>b\nMK\n>a y\nMKVV\n")
    assert files_in(tmp_path / "out") == []


def test_one_id_accepted_and_rejected_is_refused(run, refused):
    with refused("records 1 and 2", "'a'"):
        run(b">a\nMKV\n>a\nM-V\n")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"", ["empty"], id="empty"),
        pytest.param(b" \n\n", ["empty"], id="blank"),
        pytest.param(gzip.compress(b""), ["empty"], id="empty-gzip"),
        pytest.param(b"id,sequence\na,MKV\n", ["not FASTA", "'id,sequence'"], id="csv"),
        pytest.param(b"MKVLA\n", ["not FASTA", "'MKVLA'"], id="no-header"),
        pytest.param(b"\x89PNG\r\n\x1a\n\x00\xff", ["not FASTA"], id="png"),
        pytest.param(gzip.compress(MIXED * 100)[:60], ["broken gzip"], id="truncated-gzip"),
        pytest.param(gzip.compress(MIXED)[:-3], ["broken gzip"], id="gzip-without-its-end"),
        pytest.param(b"\x1f\x8b" + MIXED, ["broken gzip"], id="gzip-in-name-only"),
        pytest.param(gzip.compress(MIXED) + b"tail", ["broken gzip"], id="gzip-with-a-tail"),
        pytest.param(
            gzip.compress(MIXED)[:20] + b"\xff" * 40 + gzip.compress(MIXED)[60:],
            ["broken gzip"],
            id="gzip-with-flipped-bytes",
        ),
        pytest.param(bz2.compress(MIXED), ["bzip2"], id="bzip2"),
        pytest.param(lzma.compress(MIXED), ["xz"], id="xz"),
        pytest.param(MIXED.decode().encode("utf-16"), ["UTF-16"], id="utf-16"),
    ],
)
def test_what_is_no_fasta_is_one_line_and_leaves_nothing(run, refused, tmp_path, files_in, data, words):
    with refused("in.fasta", *words):
        run(data)
    assert files_in(tmp_path / "out") == []


def test_a_zip_archive_is_one_line(run, refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("in.fasta", MIXED)
    with refused("zip archive"):
        run(buffer.getvalue())


@pytest.mark.parametrize(("make", "words"), [("mkdir", ["directory"]), ("exists", ["No such file"])])
def test_what_is_no_file_is_one_line_and_leaves_nothing(tmp_path, refused, files_in, make, words):
    fasta, folder = tmp_path / "in.fasta", tmp_path / "out"
    getattr(fasta, make)()
    with refused("in.fasta", *words):
        ingest(fasta, folder / "records.parquet", folder / "sequences.parquet", folder / "summary.json")
    assert files_in(folder) == []


def test_a_failure_keeps_the_tables_of_before(run, tmp_path, files_in):
    run(MIXED)
    before = {path: path.read_bytes() for path in files_in(tmp_path / "out")}
    with pytest.raises(LengthwiseError):
        run(b">a\nMKV\n>a\nMKVV\n")
    assert {path: path.read_bytes() for path in files_in(tmp_path / "out")} == before


def test_skip_rejects_longer_sequences_than_max_residues_and_full_none(run):
    data = b">short\nMKV\n>edge\nMKVL*\n>long\nMKVLA\n"
    records, sequences, summary = run(data, long_policy="skip", max_residues=4)
    assert column(records, "status") == ["accepted", "accepted", "rejected"]
    assert records[2]["reason"] == "too_long: 5 residues, more than max_residues = 4"
    assert column(sequences, "sequence") == [b"MKV", b"MKVL"]
    assert summary["reasons"] == {"too_long": 1}
    assert run(data, long_policy="full", max_residues=4)[2]["rejected"] == 0


@pytest.mark.parametrize(
    ("letters", "raw", "expected"),
    [
        ({"lowercase": "reject"}, "mKV", "invalid_byte: 'm' (0x6D) at position 1"),
        ({"j": "reject"}, "MKJV", "invalid_byte: 'J' (0x4A) at position 3"),
        ({"j": "reject"}, "MKjV", "invalid_byte: 'j' (0x6A) at position 3"),
        ({"lowercase": "reject"}, "MKjV", "invalid_byte: 'j' (0x6A) at position 3"),
        ({"stop": "to_x"}, "MK*V*", ("MKXV", "stop_stripped,stop_to_x")),
        ({"gaps": "remove"}, "M-K.V-", ("MKV", "gaps_removed")),
        ({"gaps": "remove"}, "-.-", "empty"),
        ({"spaces": "reject"}, "MK V", "invalid_byte: (0x20) at position 3"),
        ({"digits": "remove"}, " 1 MKV\n 4 LAW* 7", ("MKVLAW", "stop_stripped,spaces_removed,digits_removed")),
        ({}, "M KV *", ("MKV", "stop_stripped,spaces_removed")),
    ],
    ids=str,
)
def test_each_policy_for_letters_does_what_it_says(run, letters, raw, expected):
    records, sequences, summary = run(f">a\n{raw}\n".encode(), letters=Letters(**letters))
    if isinstance(expected, str):
        assert (records[0]["reason"], records[0]["changes"], sequences) == (expected, "", [])
    else:
        assert (sequences[0]["sequence"].decode(), records[0]["changes"]) == expected
        assert summary["changes"] == dict.fromkeys(expected[1].split(","), 1)


def test_suffix_renames_every_later_sequence_of_an_id(run):
    data = b">a x\nMKV\n>a\nMKVL\n>b\nMKVLA\n>a\nmkv\n>a\nM-V\n>a\nMKVL\n"
    records, sequences, summary = run(data, duplicate_ids="suffix")
    assert column(records, "id") == ["a", "a_2", "b", "a", "a_3", "a_2"]
    assert column(records, "status") == ["accepted", "accepted", "accepted", "duplicate", "rejected", "duplicate"]
    assert column(records, "changes") == ["", "id_suffixed", "", "uppercased", "id_suffixed", "id_suffixed"]
    assert summary["changes"] == {"uppercased": 1, "id_suffixed": 3}
    assert len(sequences) == 3


def test_a_suffix_that_makes_an_id_that_is_there_is_refused(run, refused, tmp_path, files_in):
    with refused("record 3, 'a'", "'a_2'", "record 2"):
        run(b">a\nMKV\n>a_2\nMKVL\n>a\nMKVLA\n", duplicate_ids="suffix")
    assert files_in(tmp_path / "out") == []


def test_nucleotides_are_taken_where_they_are_allowed(run, refused):
    dna = b">a\n" + b"ACGT" * 30 + b"\n"
    with refused("looks like nucleotides", "nucleotides: allow"):
        run(dna)
    assert run(dna, nucleotides="allow")[2]["accepted"] == 1


def test_whether_a_file_looks_like_nucleotides_depends_on_nothing_but_its_records(run, refused, monkeypatch):
    monkeypatch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", 500)
    rng = random.Random(5)
    dna = {f"d{i}": "".join(rng.choices("ACGT", k=100)) for i in range(21)}
    proteins = {f"p{i}": "".join(rng.choices(tokens.STANDARD.decode(), k=100)) for i in range(20)}
    for number in (21, 19):
        chosen = list(({k: dna[k] for k in list(dna)[:number]} | proteins).items())
        for _ in range(8):
            rng.shuffle(chosen)
            data = rendered(dict(chosen), rng.choice([7, 60, 200]))
            data = rng.choice([bytes, gzip.compress, bytes.lower])(data)
            if number == 21:
                with refused("looks like nucleotides", "2,100 of 4,100 letters"):
                    run(data)
            else:
                assert run(data)[2]["changes"]["like_nucleotides"] == 19


def test_a_large_file_of_nucleotides_is_refused_before_its_end(run, refused, monkeypatch):
    monkeypatch.setattr("lengthwise.ingest.nucleotides._MOST_NUCLEOTIDES", 10_000)
    monkeypatch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", 5_000)
    dna = b"".join(b">d%d\n%b\n" % (i, b"ACGTTGCA" * 20) for i in range(1000))
    with refused("looks like nucleotides", "letters are in records") as caught:
        run(dna)
    assert int(str(caught.value).split(" of ")[1].split()[0].replace(",", "")) < 20_000


def test_strict_makes_the_first_rejection_an_error(run, refused, tmp_path, files_in):
    with refused("in.fasta: 2 of its records", "record 4 (byte 81, line 8)", "'four'", "'-' (0x2D)", "strict: false"):
        run(MIXED, strict=True)
    assert files_in(tmp_path / "out") == []
    assert run(b">a\nMKV\n>b\nmkv\n", strict=True)[2]["duplicate"] == 1


def rendered(proteins: dict[str, str], width: int) -> bytes:
    lines = ([sequence[i : i + width] for i in range(0, len(sequence), width)] for sequence in proteins.values())
    return "".join(
        f">{n}\n" + "".join(f"{line}\n" for line in own) for n, own in zip(proteins, lines, strict=True)
    ).encode()


@pytest.mark.parametrize("block_bytes", [64, 1000, 2 << 20])
def test_width_order_and_compression_change_no_digest(run, random_proteins, monkeypatch, block_bytes):
    monkeypatch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", block_bytes)
    proteins = random_proteins(100, longest=300) | {"again": next(iter(random_proteins(100, longest=300).values()))}
    _, expected, _ = run(rendered(proteins, 60))
    for data in (rendered(proteins, 7), gzip.compress(rendered(proteins, 1000))):
        assert run(data)[1] == expected
    backwards = run(rendered(dict(reversed(proteins.items())), 60))[1]
    assert sorted(column(backwards, "digest")) == sorted(column(expected, "digest"))


def test_order_width_line_ends_and_compression_change_no_shard_and_no_vector(small_store, random_proteins):
    proteins = list(random_proteins(40, longest=200).items())
    parts = {"a": dict(proteins[:28]), "b": dict(proteins[16:])}
    ways = [  # the same two files
        {name: rendered(own, 60) for name, own in parts.items()},
        {"b": gzip.compress(rendered(parts["b"], 7)), "a": rendered(dict(reversed(parts["a"].items())), 1000)},
        {name: rendered(own, 33).replace(b"\n", b"\r\n").lower() for name, own in parts.items()},
    ]
    stores = []
    for files in ways:
        stores.append(store := small_store())
        for name, data in files.items():
            (store.folder / name).write_bytes(data)
            paths = (store.inputs(name) / file for file in ("records.parquet", "sequences.parquet", "summary.json"))
            ingest(store.folder / name, *paths)
            store.datasets.append(name)
        store.run(shard_bytes=20_000)
    first = {path.name: path.read_bytes() for path in stores[0].shard_files()}
    assert len(first) > 5
    for store in stores[1:]:
        assert {path.name: path.read_bytes() for path in store.shard_files()} == first
        for name, own in parts.items():
            one, other = stores[0].open(name), store.open(name)
            means = [dict(zip(ds.ids, ds.pooled("mean"), strict=True)) for ds in (one, other)]
            for record_id in own:
                assert one[record_id].tobytes() == other[record_id].tobytes()
                assert means[0][record_id].tobytes() == means[1][record_id].tobytes()


def test_repeats_far_apart_are_found_and_ids_too(run, random_proteins, monkeypatch):
    monkeypatch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", 500)
    once = random_proteins(500)
    twice = once | {f"{name}_again": sequence for name, sequence in once.items()}
    records, sequences, _ = run(rendered(twice, 60))
    assert column(records, "status") == ["accepted"] * 500 + ["duplicate"] * 500
    assert column(sequences, "digest") == column(records, "digest")[:500] == column(records, "digest")[500:]


def test_two_digests_with_the_same_first_bytes_are_two_sequences(run, monkeypatch):
    real = digests_module.digest_all

    def colliding(residues, bounds):
        digests = real(residues, bounds).copy()
        digests[:, :8] = 7
        return digests

    monkeypatch.setattr(judge, "digest_all", colliding)
    assert column(run(b">a\nMKV\n>b\nMKVL\n>c\nmkv\n")[0], "status") == ["accepted", "accepted", "duplicate"]


def test_a_record_has_as_many_tokens_for_fair_esm_as_residues_and_two_more(run, random_proteins):
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    _, sequences, _ = run(MIXED + rendered(random_proteins(50), 60) + b">rare\nUOBZXJ*\n")
    for row in sequences:
        assert convert([("", row["sequence"].decode())])[2].shape[1] == row["length"] + 2


@pytest.mark.parametrize("body", ["MKjV", "MKVL\nWWJ", "AC-DE"])
def test_an_accepted_residue_without_a_token_of_its_own_stops_ingest(run, monkeypatch, body):
    """As if the search for unusual letters had missed one, or the mending had."""
    data = b">a\nMKV\n>b\n" + body.encode() + b"\n>c\nMKVL\n"
    monkeypatch.setattr(judge, "normalize", lambda raw, letters: (raw, [], ""))
    with pytest.raises(RuntimeError, match="no token of its own"):
        run(data)
    monkeypatch.setattr("lengthwise.ingest.judge._with_unusual_bytes", lambda residues, bounds: [])
    with pytest.raises(RuntimeError, match="no token of its own"):
        run(data)


def test_with_little_memory_the_same_tables_come_out_by_way_of_the_disk(tmp_path, monkeypatch, refused):
    """A quarter of a million ids do not fit into 14 MiB; what is spilled is gone afterwards."""
    expected, little = write(tmp_path / "in.fasta", 250_000), 14 << 20

    def tables_within(memory_bytes: int) -> list[bytes]:
        folder = tmp_path / str(memory_bytes)
        paths = [folder / name for name in ("records.parquet", "sequences.parquet", "summary.json")]
        summary = ingest(tmp_path / "in.fasta", *paths, memory_bytes=memory_bytes)
        assert {key: summary[key] for key in expected} == expected
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
        return [path.read_bytes() for path in paths]

    assert tables_within(little) == tables_within(1 << 30)
    connect = duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda config: connect(config=config | {"temp_directory": ""}))
    with refused("ingest ran out of its 14,680,064 bytes of memory", "--set-resources ingest:mem_mb="):
        tables_within(little)
