"""Ingest against Biopython's parse of the same files, its tables read with DuckDB; what is no FASTA leaves nothing."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import duckdb
import pytest
from Bio import SeqIO

from lengthwise.errors import LengthwiseError
from lengthwise.files import sha256
from lengthwise.ingest import Policy, ingest

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
        summary = ingest(fasta, *paths, Policy(**options))
        assert json.loads(paths[2].read_text()) == summary
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
    monkeypatch.setattr("lengthwise.ingest.ROWS_PER_GROUP", 7)
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
