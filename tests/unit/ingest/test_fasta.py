"""The reader alone: the same records however a file is rendered and wherever its blocks end; of garbage, one error."""

import gzip
import io
import random
import struct
import time
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from Bio import SeqIO
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.tokens import RESIDUES, STANDARD
from lengthwise.ingest.decompress import ZstdDecompressor
from lengthwise.ingest.fasta import joined_lines, place, read_chunks, refuse_another_file, split_headers, split_records

if ZstdDecompressor.__module__.startswith("backports"):
    from backports import zstd
else:
    from compression import zstd

ANY_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parse(path, refuse=refuse_another_file) -> list[tuple[str, str, bytes]]:
    """(id, description, sequence) of every record, by the functions that ingest uses."""
    found = []
    for chunk in read_chunks(path):
        headers, lines, first = split_records(chunk)
        ids, descriptions = split_headers(headers)
        lines = lines.to_pylist()
        own_lines = [lines[start:stop] for start, stop in pairwise(first.tolist())]
        for number, own in enumerate(own_lines, len(found) + 1):
            refuse(path, lambda number=number: number, b"\n" + b"\n".join(own))
        sequences = map(joined_lines, own_lines)
        found += zip(ids.to_pylist(), descriptions.to_pylist(), sequences, strict=True)
    return found


@pytest.fixture(params=[5, 7, 64, 2 << 20])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", request.param)


# No backslash: one before xNN is escaped, which has a test of its own.
headers = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\\"), max_size=30).map(lambda text: "r" + text)
sequences = st.text(RESIDUES.decode(), max_size=200)


@st.composite
def renderings(draw):
    """(the records, a file of them): line widths, line ends, case, blank lines and compression as it comes."""
    records = draw(st.lists(st.tuples(headers, sequences), min_size=1, max_size=8))
    text = draw(st.sampled_from(["", "\ufeff"])) + "\n" * draw(st.integers(0, 2))
    end = draw(st.sampled_from(["\n", "\r\n", "\r", None]))
    ends = st.sampled_from(["\n", "\r\n", "\r"]) if end is None else st.just(end)
    for header, sequence in records:
        width = draw(st.integers(1, 80))
        lines = [sequence[i : i + width] for i in range(0, len(sequence), width)]
        text += f">{header}{draw(ends)}" + "".join(line + draw(ends) * draw(st.integers(1, 2)) for line in lines)
    data = text.encode()
    if draw(st.booleans()):
        data = data.rstrip(b"\r\n") or data
    pack = draw(st.sampled_from([bytes, gzip.compress, zstd.compress]))
    cut = draw(st.integers(0, len(data)))
    return records, pack(data[:cut]) + pack(data[cut:])


@ANY_FOLDER
@given(rendering=renderings())
def test_the_same_records_come_back_however_they_are_rendered(rendering, block_bytes, tmp_path):
    records, data = rendering
    (tmp_path / "in").write_bytes(data)
    expected = []
    for header, sequence in records:
        words = header.strip().split(None, 1)
        expected.append((words[0], words[1] if len(words) > 1 else "", sequence.encode()))
    assert parse(tmp_path / "in") == expected


@settings(ANY_FOLDER, max_examples=300)
@given(text=st.text("MKV>> \t\r\n\x0b\x1c\u00a0é*-", max_size=60).map(lambda text: ">" + text))
def test_what_biopython_reads_is_read_as_biopython_reads_it(text, tmp_path):
    (tmp_path / "in").write_bytes(text.encode())
    lines = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")  # CR, LF and CRLF end a line
    expected = []
    for title, sequence in SimpleFastaParser(lines):
        words = title.split(None, 1)
        # Biopython drops spaces, and all whitespace at the ends of lines.
        expected.append((words[0] if words else "", words[1] if len(words) > 1 else "", "".join(sequence.split())))
    found = [(i, d, "".join(sequence.decode().split())) for i, d, sequence in parse(tmp_path / "in", lambda *_: None)]
    assert found == expected


def test_the_shipped_proteins_are_those_of_biopython(request):
    path = request.config.rootpath / "config" / "example.fasta"
    records = list(SeqIO.parse(path, "fasta"))
    assert [(r.id, bytes(r.seq)) for r in records] == [(i, sequence) for i, _, sequence in parse(path)]
    assert [r.description for r in records] == [f"{i} {description}".strip() for i, description, _ in parse(path)]


PIECES = [
    b">",
    b"\n>",
    b"\n",
    b"\r",
    b"\r\n",
    b" ",
    b"\0",
    b"\xff",
    b"*",
    b"<mask>",
    b"\xef\xbb\xbf",
    b"@",
    b">x\nMK\n",
]
PIECES += [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\0\0\0\0", gzip.compress(b">a\nMK\n"), bytes(300)]


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A file with a few defects more: bits flipped, pieces put in, taken out, doubled or taken over from another file."""
    for _ in range(rng.randint(1, 5)):
        at, other = rng.randint(0, len(data)), rng.choice(others)
        stop = min(len(data), at + rng.choice([1, 4, 50]))
        start = rng.randint(0, len(other))
        flipped = bytes([data[at] ^ 1 << rng.randint(0, 7)]) if at < len(data) else b""
        middle = rng.choice([flipped, rng.choice(PIECES), b"", data[at:stop] * 2, other[start : start + 50]])
        data = data[:at] + middle + data[rng.choice([at, at + len(flipped), stop]) :]
    return rng.choice([bytes, bytes, bytes, gzip.compress, zstd.compress])(data)


def outcome(path: Path, block_bytes: int) -> list | None:
    """The records, or None for an error of one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", block_bytes)
        try:
            return parse(path)
        except LengthwiseError as error:
            if "\n" in str(error):
                raise ValueError("an error of several lines") from error
            return None


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(60, marks=pytest.mark.slow), pytest.param(600, marks=pytest.mark.huge)]
)
def test_mutations_of_hostile_files_are_records_or_one_error_wherever_blocks_end(seconds, tmp_path):
    names = sorted((Path(__file__).parents[2] / "hostile").iterdir())
    files = [
        path.read_bytes() for path in names if "pir" not in path.name
    ]  # which no block of nine bytes shows to be one
    path, until, seed, ends = tmp_path / "in", time.monotonic() + seconds, time.time_ns(), Counter()
    rng = random.Random(seed)
    while time.monotonic() < until:
        data = mutated(rng.choice(files), files, rng)
        path.write_bytes(data)
        try:
            records = outcome(path, 2 << 20)
            assert outcome(path, rng.choice([9, 30, 200])) == records
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data!r}") from error
        ends[records is None] += 1
    assert min(ends[True], ends[False]) > 10 * seconds  # both are met, and often


@settings(ANY_FOLDER, max_examples=200)
@given(data=st.data())
def test_a_compressed_file_with_any_byte_changed_or_cut_away_is_the_same_or_an_error(data, tmp_path):
    text = b"".join(b">%d\n%s\n" % (i, STANDARD * (i + 1)) for i in range(9))
    packed = bytearray(data.draw(st.sampled_from([gzip.compress(text), _with_checksum(text)])))
    if data.draw(st.booleans()):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del packed[data.draw(st.integers(5, len(packed) - 1)) :]
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "packed").write_bytes(packed)
    refusal = ""
    try:
        found = parse(tmp_path / "packed")
    except LengthwiseError as error:
        refusal = str(error)
        found = parse(tmp_path / "plain")
    assert found == parse(tmp_path / "plain")
    assert "\n" not in refusal


@pytest.mark.parametrize("flags", range(32))
def test_headers_of_gzip_members_may_hold_anything_and_lie_anywhere(tmp_path, block_bytes, flags, refused):
    text = b">a\n" + STANDARD + b"\n"
    pack = zlib.compressobj(wbits=-15)
    header = b"\x1f\x8b\x08%c\0\0\0\0\0\xff" % flags
    header += b"\x06\0BC\x02\0\x1b\0" * bool(flags & 4) + b"a.fasta\0" * bool(flags & 8) + b"\0" * bool(flags & 16)
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF) * bool(flags & 2)
    member = header + pack.compress(text) + pack.flush() + struct.pack("<II", zlib.crc32(text), len(text))
    (tmp_path / "in").write_bytes(member * 20)
    assert parse(tmp_path / "in") == [("a", "", STANDARD)] * 20
    for cut in range(4, len(header) + 1):
        (tmp_path / "in").write_bytes(member + header[:cut])
        with refused("in: broken gzip: "):
            parse(tmp_path / "in")


def test_a_gzip_header_without_an_end_is_refused_and_not_gathered(tmp_path, refused):
    (tmp_path / "in").write_bytes(b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * (9 << 20))
    with refused("in: broken gzip: "):
        parse(tmp_path / "in")


def _with_checksum(text: bytes) -> bytes:
    return zstd.compress(text, options={zstd.CompressionParameter.checksum_flag: 1})


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_a_place_is_the_byte_and_the_line_of_a_record(ends, block_bytes, tmp_path):
    lines = [b">a", b"MKV", b"", b">b", b"MK>V", b"MK", b">c"]
    (tmp_path / "in").write_bytes(ends.join(lines))
    for number, line in [(1, 1), (2, 4), (3, 7)]:
        offset = len(ends.join([*lines[: line - 1], b""]))
        assert place(tmp_path / "in", number) == f"byte {offset}, line {line}"


def test_a_record_that_no_protein_is_as_long_as_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", 1000)
    monkeypatch.setattr("lengthwise.ingest.fasta.MAX_RECORD_BYTES", 5000)
    (tmp_path / "in").write_bytes(b">a\nMK\n>b\n" + b"MKV\n" * 2000)
    with refused("in: ", "begins at byte 6, line 3:", "no protein is so long"):
        parse(tmp_path / "in")


def test_where_files_were_put_together_is_found_however_far_a_record_goes(tmp_path, block_bytes, refused):
    lines = [b">a", b"MKV  ", b"<mask>", b"", b">b>", *[b"MKVLA"] * 30, b"MK>c", b"MKV"]
    for end in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + end.join(lines))
        offset = 3 + len(end.join(lines[:35])) + len(end) + 2
        with refused(f"in: byte {offset}, line 36: '>' inside a line"):
            parse(tmp_path / "in")


def test_lines_of_a_long_record_are_joined_as_those_of_a_short_one(tmp_path, block_bytes):
    body = b"".join(line * 40 for line in (b"\n", b"MK\n", b"A C \t\n", b" \n", b"VLA", b"  ", b"\n\n"))
    (tmp_path / "in").write_bytes(b">a\n\n\n" + body + b">b\nMKV  \n" + body)
    expected = b"MK" * 40 + b"A C" * 40 + b"VLA" * 40
    assert parse(tmp_path / "in") == [("a", "", expected), ("b", "", b"MKV" + expected)]


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"])
def test_no_line_of_a_long_record_and_the_next_are_taken_for_compressed_data(tmp_path, block_bytes, magic):
    lines = [b">a", *[b"MKVLA"] * 20, magic[:1], b"", magic[1:] + b"\x1f \t", b" \x8b\x08", *[b"MKVLA"] * 20]
    (tmp_path / "in").write_bytes(b"\n".join(lines))
    assert parse(tmp_path / "in") == [("a", "", joined_lines(lines[1:]))]


def test_what_only_looks_like_an_escaped_byte_is_told_from_one(tmp_path):
    ids = [b"a\xe9", rb"a\xe9", rb"a\x5cxe9", rb"a\\xe9", rb"a\xE9", rb"a\n", b"a\\\xe9"]
    (tmp_path / "in").write_bytes(b"".join(b">%b\nM\n" % each for each in ids))
    found = [i for i, _, _ in parse(tmp_path / "in")]
    assert found[:2] == [r"a\xe9", r"a\x5cxe9"]
    assert found[4:6] == [r"a\xE9", r"a\n"]
    assert len(set(found)) == len(ids)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("lengthwise.ingest.decompress.BLOCK_BYTES", 4)
    path = tmp_path / "in"
    path.write_bytes(b">a\nMK\n>b\nMKV\n")
    chunks = read_chunks(path)
    next(chunks)
    with open(path, "ab") as file:
        file.write(b">c\nM\n")
    with refused("in: changed while it was read"):
        list(chunks)


def test_nothing_is_copied_out_of_a_chunk_that_is_not_in_it():
    headers, lines, first = split_records(b">a\nMK\n>b\n\n>\n")
    assert (headers.to_pylist(), lines.to_pylist(), first.tolist()) == ([b"a", b"b", b""], [b"MK", b""], [0, 1, 2, 2])
    assert split_headers(pa.array([b"", b"a"], pa.binary()))[0].to_pylist() == ["", "a"]
