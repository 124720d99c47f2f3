"""Reading FASTA: text in chunks of whole records, chunks as Arrow arrays, and errors for files that are not FASTA."""

import functools
import re
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lengthwise.errors import LengthwiseError
from lengthwise.ingest import decompress
from lengthwise.ingest.decompress import (
    BYTE_ORDER_MARK,
    compression_of,
    is_compressed,
    read_content,
    read_text,
)

# The longest known protein has 45,000 residues; memory is bounded by a few times this.
MAX_RECORD_BYTES = 64 << 20
MAX_DESCRIPTION = 1_000

_OTHER_FORMATS = [
    (re.compile(rb"BZh[1-9]"), "a bzip2-compressed file; decompress it first"),
    (re.compile(rb"PK\x03\x04"), "a zip archive; unpack it first"),
    (re.compile(rb"\xfd7zXZ"), "an xz-compressed file; decompress it first"),
    (re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd"), "a file compressed twice; decompress it once"),
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|>\0\0\0|\0\0\0>"), "UTF-32 text; convert it to UTF-8"),
    (re.compile(rb"\xff\xfe|\xfe\xff|>\0|\0>"), "UTF-16 text; convert it to UTF-8"),
    # Named because it begins with '>', so that its title would be read as residues.
    (re.compile(rb">(P1|F1|D[LC]|R[LC]|N[13]|XX);\S+[ \t]*[\r\n].*\*", re.DOTALL), "PIR (NBRF); convert it to FASTA"),
    # A SAM file's lines begin with '@', two letters and a tab.
    (re.compile(rb"@(?![A-Z]{2}\t)"), "FASTQ; convert it to FASTA and translate it to proteins"),
    (re.compile(rb"LOCUS\s"), "GenBank; export its proteins as FASTA"),
    (
        re.compile(rb"(HEADER|TITLE|COMPND|EXPDTA|CRYST1|REMARK|MODEL|ATOM|HETATM) "),
        "PDB; export its sequences as FASTA",
    ),
    (re.compile(rb"# STOCKHOLM|CLUSTAL"), "an alignment; export its sequences, without gaps, as FASTA"),
]

_LINE_END, _HEADER_MARK, _SPACE, _DELETE = b"\n> \x7f"

# Concatenated files: how a second file seems to begin inside a record, and what to do. A '>' may also end a literal token of
# ESM-2 in a sequence, such as <mask>.
_OTHER_FILES = [
    (
        rb"(?<!<cls)(?<!<pad)(?<!<eos)(?<!<unk)(?<!<mask)>",
        "'>' inside a line; put the line break before it that a header needs, or take it out",
    ),
    (rb"(?<=[\r\n])\xef\xbb\xbf", "a byte-order mark between two records; remove it"),
    (
        rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd",
        "gzip or zstd data in a sequence; decompress a file before it is added to another",
    ),
    (rb"(?<=[\r\n])@", "'@' begins a line, as in FASTQ and SAM; remove all that is not FASTA"),
    (rb"(?<=[\r\n])\0|\0\0", "NUL bytes in a sequence; remove them, or fetch the file again"),
]

_ANOTHER_FILE = re.compile(b"|".join(b"(%s)" % pattern for pattern, _ in _OTHER_FILES))
_BEGINNINGS = [b">", b"\xef", b"\x1f", b"\x28", b"@", b"\0"]
_LIKE_AN_ESCAPE = re.compile(rb"\\(?=x[0-9a-f]{2})")
_HEADER, _BREAK = re.compile(rb"(?<=[\r\n])>"), re.compile(rb"[\r\n]")
_PATTERN_BYTES = 8  # no pattern above matches or looks behind further


def read_chunks(fasta: Path, on_raw_bytes: Callable[[bytes], None] = lambda raw: None) -> Iterator[bytes]:
    """Yield a FASTA file's text in chunks of whole records: each begins with ``>``, and every line in it ends with LF.

    Parameters
    ----------
    fasta
        Plain, gzip (bgzip, several members) or zstd, told apart by content.
    on_raw_bytes
        Called with the file's bytes, before decompression, as they are read.

    Raises
    ------
    LengthwiseError
        The file cannot be read to its end, changes while it is read, has a record of more than 64 MiB, or is not FASTA.
    """
    chunks, record, rest, returns = 0, b"", b"", b""
    for block in _from_first_header(fasta, read_text(fasta, on_raw_bytes)):
        block = returns + block
        returns = b"\r" if block.endswith(b"\r") else b""  # may be the first half of a CRLF
        block = block.removesuffix(returns)
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = block.rfind(b"\n>") + 1
        if not cut:  # the boundary may lie between two blocks
            searched = max(len(rest) - 1, 0)
            rest, block = b"", rest + block
            cut = block.rfind(b"\n>", searched) + 1
        if cut:
            yield b"".join([record, rest, memoryview(block)[:cut]])
            chunks, record = chunks + 1, b""
        rest = block[cut:]
        if len(rest) > decompress.BLOCK_BYTES:
            number = functools.partial(_number_after, fasta, chunks)
            record, rest = _with_lines_joined(fasta, number, record, rest)
            if len(record) + len(rest) > MAX_RECORD_BYTES:
                raise LengthwiseError(
                    f"{fasta}: a record of more than {MAX_RECORD_BYTES >> 20} MiB begins at {place(fasta, number())}: no "
                    "protein is so long; remove it, or translate it if it is a genome"
                )
    yield record + rest + b"\n"


def _with_lines_joined(fasta: Path, number: Callable[[], int], record: bytes, rest: bytes) -> tuple[bytes, bytes]:
    """Move a long record's complete lines from `rest` to `record`, without line ends, so that blank lines need no memory."""
    if not record:
        end = rest.find(b"\n")
        record, rest = rest[: end + 1], rest[max(end, 0) :]
    if record:
        refuse_another_file(fasta, number, rest)
        last = rest.rfind(b"\n")
        lines = [line.rstrip() for line in rest[:last].split(b"\n")]
        if _may_begin_another(rest):  # joined lines could match a pattern that neither matches
            lines = [line + b"\n" for line in lines if line]
        record, rest = record + b"".join(lines), rest[last:]
    return record, rest


def joined_lines(lines: list[bytes]) -> bytes:
    """A raw sequence from its lines, without whitespace at their ends."""
    return b"".join(map(bytes.rstrip, lines))


def refuse_another_file(fasta: Path, number: Callable[[], int], text: bytes) -> None:
    """Raise LengthwiseError if another file seems to begin inside a record: its records would be lost silently.

    Parameters
    ----------
    number
        Returns the record's number; called only for the error.
    text
        The record's lines, each after an LF.
    """
    if _may_begin_another(text) and (found := _ANOTHER_FILE.search(text)):
        what = _OTHER_FILES[(found.lastindex or 1) - 1][1]
        raise LengthwiseError(f"{fasta}: {place(fasta, number(), _ANOTHER_FILE)}: {what}")


def _may_begin_another(text: bytes) -> bool:
    return any(byte in text for byte in _BEGINNINGS)


def _number_after(fasta: Path, chunks: int) -> int:
    """The number of the first record after this many chunks."""
    return sum(chunk.count(b"\n>") + 1 for chunk in islice(read_chunks(fasta), chunks)) + 1


def place(fasta: Path, record_no: int, inside: re.Pattern[bytes] | None = None) -> str:
    """Byte and line, in words, of a record or of the first match of `inside` in its sequence; reads the file again."""
    steps = chain(repeat(_HEADER, record_no), [_BREAK, inside] if inside else [])
    step: re.Pattern[bytes] | None = next(steps)
    at = 0
    text, offset, line, before = b"\n", -1, 0, b""  # as if the file began after a line
    for block in read_text(fasta):
        text += block
        while step and (found := step.search(text, at)):
            at, step = found.end(), next(steps, None)
            if step is None:
                return _place(fasta, offset + found.start(), line + _line_ends(text[: found.start()], before))
        at = max(at, len(text) - _PATTERN_BYTES)
        done = max(at - _PATTERN_BYTES, 0)
        offset, line, before = offset + done, line + _line_ends(text[:done], before), text[done - 1 : done] or before
        text, at = text[done:], at - done
    raise LengthwiseError(f"{fasta}: changed while it was read; run again once nothing writes to it")


def _place(fasta: Path, offset: int, line: int) -> str:
    """Byte and line, in words, from an offset and line in the output of `read_text`."""
    if next(read_content(fasta)).startswith(BYTE_ORDER_MARK):
        offset += len(BYTE_ORDER_MARK)
    return f"byte {offset:,}, line {line:,}" + (" of its decompressed content" if is_compressed(fasta) else "")


def _line_ends(text: bytes, before: bytes) -> int:
    pairs = text.count(b"\r\n") + (before == b"\r" and text.startswith(b"\n"))
    return text.count(b"\n") + text.count(b"\r") - pairs


def split_records(chunk: bytes) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """Split a chunk into records, without a Python loop.

    Returns
    -------
    (headers, lines, first)
        [n] headers without ``>``; all sequence lines without line ends; [n + 1] index of each record's first line in `lines`.
    """
    codes = np.frombuffer(chunk, np.uint8)
    line_ends = np.flatnonzero(codes == _LINE_END)
    bounds = np.empty(2 * len(line_ends) + 1, np.int32)  # of each line and each line end
    bounds[0], bounds[1::2], bounds[2::2] = 0, line_ends, line_ends + 1
    is_header = codes[bounds[:-1:2]] == _HEADER_MARK
    header_lines = np.flatnonzero(is_header)
    bounds[2 * header_lines] += 1
    pieces = _slices(pa.binary(), chunk, bounds)
    headers, lines = (pieces.take(pa.array(2 * chosen)) for chosen in (header_lines, np.flatnonzero(~is_header)))
    return headers, lines, np.append(header_lines - np.arange(len(headers)), len(lines))


def split_headers(headers: pa.Array) -> tuple[pa.Array, pa.Array]:
    """(ids, descriptions): the first word of each header and, up to `MAX_DESCRIPTION` characters, the rest.

    Bytes that are not UTF-8 become ``\\xNN``; the backslash of text that looks like that becomes ``\\x5c``.
    """
    text, bounds = joined(headers)
    codes = np.frombuffer(text + b"-", np.uint8)  # one more byte, to index behind the last header
    spaces = pc.find_substring(headers, " ").to_numpy()
    ends = np.where(spaces < 0, bounds[1:], bounds[:-1] + spaces)  # of the ids
    starts = np.minimum(ends + 1, bounds[1:])  # of the descriptions
    plain = (
        codes.min() >= _SPACE
        and codes.max() < _DELETE
        and b"\\" not in text
        and np.diff(bounds).all()
        and spaces.all()
        and not (codes[starts] == _SPACE).any()
        and not (codes[bounds[1:] - 1] == _SPACE).any()
    )
    if plain:
        thirds = np.empty(3 * len(headers) + 1, np.int32)  # id, space, description
        thirds[0::3], thirds[1::3], thirds[2::3] = bounds, ends, starts
        pieces = _slices(pa.string(), text, thirds)
        ids, descriptions = (pieces.take(pa.array(np.arange(k, len(pieces), 3))) for k in (0, 2))
    else:
        words = [_decoded(header).strip().split(None, 1) for header in headers.to_pylist()]
        ids = pa.array([pair[0] if pair else "" for pair in words], pa.string())
        descriptions = pa.array([pair[1] if len(pair) > 1 else "" for pair in words], pa.string())
    if len(text) and np.diff(bounds).max() > MAX_DESCRIPTION:
        descriptions = pc.utf8_slice_codeunits(descriptions, 0, MAX_DESCRIPTION)
    return ids, descriptions


def _decoded(header: bytes) -> str:
    return _LIKE_AN_ESCAPE.sub(rb"\\x5c", header).decode("utf-8", "backslashreplace")


def joined(array: pa.Array) -> tuple[bytes, np.ndarray]:
    """All values of an unsliced binary array end to end, and their [n + 1] bounds."""
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int32, len(array) + 1)
    return data.to_pybytes()[: bounds[-1]] if data else b"", bounds


def _slices(kind: pa.DataType, text: bytes, bounds: np.ndarray) -> pa.Array:
    """An array of the pieces of a text between bounds, without a copy."""
    return pa.Array.from_buffers(kind, len(bounds) - 1, [None, pa.py_buffer(bounds), pa.py_buffer(text)])


def _from_first_header(fasta: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks without blank lines before the first header; LengthwiseError if no header comes first."""
    offset, line = 0, 1
    for block in blocks:
        text = block.lstrip()
        if not text:
            offset, line = offset + len(block), line + _line_ends(block, b"")
            continue
        space = block[: len(block) - len(text)]
        blank = space[: max(space.rfind(b"\n"), space.rfind(b"\r")) + 1]
        start = block[len(blank) :]
        what = next((what for magic, what in _OTHER_FORMATS if magic.match(start)), "")
        if what or not start.startswith(b">"):
            where = _place(fasta, offset + len(blank), line + _line_ends(blank, b""))
            if compression_of(start) and not is_compressed(fasta):
                what = "compressed data after other bytes; remove the bytes before them"
            first = repr(re.split(rb"[\r\n]", start, maxsplit=1)[0][:40])[1:]
            why = f": this is {what}" if what else ", and should begin with '>'; give a FASTA file"
            raise LengthwiseError(f"{fasta}: not FASTA: {where} begins {first}{why}")
        yield start
        yield from blocks
        return
    raise LengthwiseError(f"{fasta}: the file is empty; give a FASTA file, or remove it from 'inputs'")
