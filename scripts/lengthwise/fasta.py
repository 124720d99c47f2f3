"""Reading FASTA in blocks: any compression and line ends, nothing lost between two blocks, what is no FASTA refused."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from isal.igzip_lib import DECOMP_GZIP, IgzipDecompressor, IsalError

from lengthwise.errors import LengthwiseError
from lengthwise.files import stamp

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor, ZstdError
else:
    from backports.zstd import ZstdDecompressor, ZstdError

# Small enough that a block and what is made of it stay in the processor's cache.
BLOCK_BYTES = 2 << 20
# The longest known protein has 45,000 residues; memory is bounded by a few times this.
MAX_RECORD_BYTES = 64 << 20
MAX_DESCRIPTION = 1_000

_COMPRESSIONS = {
    "gzip": (re.compile(rb"\x1f\x8b"), lambda: IgzipDecompressor(flag=DECOMP_GZIP)),
    # The second kind of frame holds no data; pzstd begins with one.
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), ZstdDecompressor),
}
_OTHER_FORMATS = [
    (re.compile(rb"BZh[1-9]"), "a bzip2-compressed file; decompress it first"),
    (re.compile(rb"PK\x03\x04"), "a zip archive; unpack it first"),
    (re.compile(rb"\xfd7zXZ"), "an xz-compressed file; decompress it first"),
    (re.compile(rb"\x1f\x8b|\x28\xb5\x2f\xfd"), "a file compressed twice; decompress it once"),
    (re.compile(rb"\xff\xfe|\xfe\xff|>\0|\0>"), "UTF-16 text; convert it to UTF-8"),
    (re.compile(rb"@"), "FASTQ; convert it to FASTA and translate it to proteins"),
    (re.compile(rb"LOCUS\s"), "GenBank; export its proteins as FASTA"),
    (re.compile(rb"ID {3}"), "an EMBL or UniProt flat file; export it as FASTA"),
    (re.compile(rb"(HEADER|CRYST1|REMARK|MODEL|ATOM|HETATM) "), "PDB; export its sequences as FASTA"),
    (re.compile(rb"data_"), "mmCIF; export its sequences as FASTA"),
    (re.compile(rb"# STOCKHOLM|CLUSTAL"), "an alignment; export its sequences, without gaps, as FASTA"),
]
_LINE_END, _HEADER_MARK, _SPACE, _DELETE = b"\n> \x7f"


def read_chunks(fasta: Path, seen: Callable[[bytes], None] = lambda raw: None) -> Iterator[bytes]:
    """Yield a FASTA file's text in chunks of whole records: each begins with ``>``, and every line in it ends with LF.

    Parameters
    ----------
    fasta
        Plain, gzip (bgzip, several members) or zstd, told apart by content.
    seen
        Is given the file's bytes as they are read.

    Raises
    ------
    LengthwiseError
        The file cannot be read whole, changes meanwhile, or is not FASTA.
    """
    rest, returns = b"", b""
    for block in _from_first_header(fasta, read_text(fasta, seen)):
        block = returns + block
        returns = b"\r" if block.endswith(b"\r") else b""  # perhaps half of a CRLF
        block = block.removesuffix(returns)
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = block.rfind(b"\n>") + 1
        if cut:
            yield b"".join([rest, memoryview(block)[:cut]])
            rest = b""
        rest += block[cut:]
        if len(rest) > MAX_RECORD_BYTES:
            raise LengthwiseError(
                f"{fasta}: a record of more than {MAX_RECORD_BYTES >> 20} MiB begins {rest[:40]!r}: no protein is so long; "
                "take it out, or translate it if it is a genome"
            )
    yield rest + b"\n"


def state(fasta: Path) -> str:
    """A file's size and time in one line: another one means that it changed."""
    found = os.stat(fasta)
    return f"{found.st_size} bytes, {found.st_mtime_ns} ns"


def read_text(fasta: Path, seen: Callable[[bytes], None] = lambda raw: None) -> Iterator[bytes]:
    """Yield a file's decompressed content, block by block, without a byte-order mark."""
    try:
        before = stamp(fasta)
        with open(fasta, "rb") as file:
            pieces = _seen_by(seen, iter(lambda: file.read(BLOCK_BYTES), b""))
            first = next(pieces, b"")
            pieces = _chain(first, pieces)
            for name, (magic, new) in _COMPRESSIONS.items():
                if magic.match(first):
                    pieces = _gathered(_decompressed(fasta, pieces, name, new))
            first = next(pieces, b"")
            yield first.removeprefix(b"\xef\xbb\xbf")
            yield from pieces
        if stamp(fasta) != before:
            raise LengthwiseError(f"{fasta}: changed while it was read; run again once nothing writes to it")
    except OSError as error:
        raise LengthwiseError(f"{fasta}: cannot be read: {error.strerror or error}") from error


def place(fasta: Path, record_no: int) -> str:
    """Where a record is, for people: byte (decompressed, after a byte-order mark) and line; reads the file once more."""
    record, offset, line, last = 0, 0, 1, b"\n"
    for block in read_text(fasta):
        text = last + block
        for found in re.finditer(rb"(?<=[\r\n])>", text):
            record += 1
            if record == record_no:
                return f"byte {offset + found.start() - 1:,}, line {line + _line_ends(text[1 : found.start()], last):,}"
        line += _line_ends(block, last)
        offset, last = offset + len(block), block[-1:] or last
    raise LengthwiseError(f"{fasta}: changed while it was read; run again once nothing writes to it")


def _line_ends(text: bytes, before: bytes) -> int:
    pairs = text.count(b"\r\n") + (before == b"\r" and text.startswith(b"\n"))
    return text.count(b"\n") + text.count(b"\r") - pairs


def split_records(chunk: bytes) -> tuple[pa.Array, pa.Array, np.ndarray]:
    """The records of a chunk, as Arrow binary arrays and in no Python loop.

    Returns
    -------
    (headers, lines, first)
        Headers without ``>``; all lines of sequences without their ends; where in `lines` each record begins, and the last ends.
    """
    codes = np.frombuffer(chunk, np.uint8)
    line_ends = np.flatnonzero(codes == _LINE_END)
    bounds = np.empty(2 * len(line_ends) + 1, np.int32)  # of each line and what is between it and the next
    bounds[0], bounds[1::2], bounds[2::2] = 0, line_ends, line_ends + 1
    is_header = codes[bounds[:-1:2]] == _HEADER_MARK
    header_lines = np.flatnonzero(is_header)
    bounds[2 * header_lines] += 1
    pieces = _slices(pa.binary(), chunk, bounds)
    headers, lines = (pieces.take(pa.array(2 * chosen)) for chosen in (header_lines, np.flatnonzero(~is_header)))
    return headers, lines, np.append(header_lines - np.arange(len(headers)), len(lines))


def split_headers(headers: pa.Array) -> tuple[pa.Array, pa.Array]:
    """(ids, descriptions): the first word of each header and, up to `MAX_DESCRIPTION` characters, the rest.

    Bytes that are not UTF-8 become ``\\xNN``.
    """
    text, bounds = joined(headers)
    codes = np.frombuffer(text + b"-", np.uint8)  # one more, to look behind the last header
    spaces = pc.find_substring(headers, " ").to_numpy()
    ends = np.where(spaces < 0, bounds[1:], bounds[:-1] + spaces)  # of the ids
    starts = np.minimum(ends + 1, bounds[1:])  # of the descriptions
    plain = (
        codes.min() >= _SPACE
        and codes.max() < _DELETE
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
        words = [header.decode("utf-8", "backslashreplace").strip().split(None, 1) for header in headers.to_pylist()]
        ids = pa.array([pair[0] if pair else "" for pair in words], pa.string())
        descriptions = pa.array([pair[1] if len(pair) > 1 else "" for pair in words], pa.string())
    if len(text) and np.diff(bounds).max() > MAX_DESCRIPTION:
        descriptions = pc.utf8_slice_codeunits(descriptions, 0, MAX_DESCRIPTION)
    return ids, descriptions


def joined(array: pa.Array) -> tuple[bytes, np.ndarray]:
    """All values of a fresh binary array end to end, and their bounds."""
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int32, len(array) + 1)
    return data.to_pybytes()[: bounds[-1]] if data else b"", bounds


def _slices(kind: pa.DataType, text: bytes, bounds: np.ndarray) -> pa.Array:
    """The pieces of a text between these bounds, not copied."""
    return pa.Array.from_buffers(kind, len(bounds) - 1, [None, pa.py_buffer(bounds), pa.py_buffer(text)])


def _from_first_header(fasta: Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks without blank lines before the first header, which there must be."""
    offset, line = 0, 1
    for block in blocks:
        text = block.lstrip()
        if not text:
            offset, line = offset + len(block), line + _line_ends(block, b"")
            continue
        blank = re.match(rb"(?:\s*[\r\n])?", block[: len(block) - len(text)]).group()
        start = block[len(blank) :]
        what = next((what for magic, what in _OTHER_FORMATS if magic.match(start)), "")
        if what or not start.startswith(b">"):
            first = repr(re.split(rb"[\r\n]", start, maxsplit=1)[0][:40])[1:]
            where = f"byte {offset + len(blank):,}, line {line + _line_ends(blank, b''):,} begins {first}"
            raise LengthwiseError(
                f"{fasta}: not FASTA: {where}" + (f": this is {what}" if what else ", and should begin with '>'")
            )
        yield start
        yield from blocks
        return
    raise LengthwiseError(f"{fasta}: the file is empty; give a FASTA file, or take it out of 'inputs'")


def _decompressed(fasta: Path, pieces: Iterable[bytes], name: str, new: Callable) -> Iterator[bytes]:
    """Decompress members (gzip) or frames (zstd) one after another; the last must be whole, and nothing may follow it.

    Zeros after the last gzip member are padding, as gzip itself has it.
    """
    decompressor, read, begun = new(), 0, False
    for piece in pieces:
        read += len(piece)
        while piece or not (decompressor.needs_input or decompressor.eof):
            if decompressor.eof:
                decompressor, begun = new(), False
            if not begun and name == "gzip" and read > len(piece):
                piece = piece.lstrip(b"\0")
                if not piece:
                    break
            try:
                yield decompressor.decompress(piece, BLOCK_BYTES)
            except (IsalError, ZstdError) as error:
                garbage = not begun and not _COMPRESSIONS[name][0].match(piece)
                where = f"garbage from byte {read - len(piece):,} on" if garbage else f"damaged before byte {read:,}"
                raise LengthwiseError(
                    f"{fasta}: broken {name}: {where} ({error}); fetch or compress the file again"
                ) from error
            begun = True
            piece = decompressor.unused_data if decompressor.eof else b""
    if begun and not decompressor.eof:
        raise LengthwiseError(
            f"{fasta}: broken {name}: cut short at byte {read:,}, in the middle of the data; fetch or compress the file again"
        )


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces joined to blocks."""
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)


def _seen_by(seen: Callable[[bytes], None], pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        seen(piece)
        yield piece


def _chain(first: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from pieces
