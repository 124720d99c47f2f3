"""Decompression: a file's content in blocks, from plain, gzip or zstd, told apart by content."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from isal.igzip_lib import DECOMP_GZIP, IgzipDecompressor, IsalError

from lengthwise.errors import LengthwiseError
from lengthwise.system.files import stamp

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor, ZstdError
else:
    from backports.zstd import ZstdDecompressor, ZstdError

# Small enough that a block and its arrays stay in the processor's cache.
BLOCK_BYTES = 2 << 20
_MAGIC_BYTES = 4
_MAX_HEADER_BYTES = 1 << 20  # of a gzip member; its file name has no limit


def _has_gzip_header(start: bytes) -> bool:
    """Whether a gzip member's header (RFC 1952, 2.3) is complete: ISA-L cannot resume inside a header."""
    if len(start) < 12:
        return False
    flags, end = start[3], 10
    if flags & 4:
        end += 2 + int.from_bytes(start[10:12], "little")
    for text in (8, 16):
        if flags & text:
            end = start.find(b"\0", end) + 1 or len(start) + 1
    return end + (flags & 2) <= len(start) or len(start) > _MAX_HEADER_BYTES


# By name: the first bytes, the decompressor, and whether enough bytes are there to start it.
_COMPRESSIONS: dict[str, tuple[re.Pattern[bytes], Callable[[], Any], Callable[[bytes], bool]]] = {
    "gzip": (re.compile(rb"\x1f\x8b"), lambda: IgzipDecompressor(flag=DECOMP_GZIP), _has_gzip_header),
    # The second pattern is a skippable frame; pzstd writes one first.
    "zstd": (
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        ZstdDecompressor,
        lambda start: len(start) >= _MAGIC_BYTES,
    ),
}

# The decompressors' errors on damaged data (isal's type stub declares IsalError as an instance).
_DAMAGED: Any = (IsalError, ZstdError)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_text(fasta: Path, on_raw_bytes: Callable[[bytes], None] = lambda raw: None) -> Iterator[bytes]:
    """Yield a file's decompressed content, block by block, without a byte-order mark."""
    content = read_content(fasta, on_raw_bytes)
    yield next(content).removeprefix(BYTE_ORDER_MARK)
    yield from content


def read_content(fasta: Path, on_raw_bytes: Callable[[bytes], None] = lambda raw: None) -> Iterator[bytes]:
    """Yield a file's decompressed content, at least one block.

    Raises
    ------
    LengthwiseError
        The file cannot be read, is damaged or cut short, or changes while it is read.
    """
    try:
        before = stamp(fasta)
        with open(fasta, "rb") as file:
            pieces = _reported(on_raw_bytes, iter(lambda: file.read(BLOCK_BYTES), b""))
            first = next(pieces, b"")
            pieces = chain([first], pieces)
            if name := compression_of(first):
                pieces = _as_blocks(_decompressed(fasta, pieces, name))
            yield from pieces
        if stamp(fasta) != before:
            raise LengthwiseError(f"{fasta}: changed while it was read; run again once nothing writes to it")
    except OSError as error:
        raise LengthwiseError(f"{fasta}: cannot be read: {error.strerror or error}") from error


def compression_of(start: bytes) -> str:
    """The compression, gzip or zstd, of data with these first bytes; empty if there is none."""
    return next((name for name, (magic, *_) in _COMPRESSIONS.items() if magic.match(start)), "")


def is_compressed(fasta: Path) -> bool:
    with open(fasta, "rb") as file:
        return bool(compression_of(file.read(_MAGIC_BYTES)))


def _decompressed(fasta: Path, pieces: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Decompress gzip members or zstd frames. The last must be complete, and no data may follow it.

    Zeros after the last gzip member are padding, as for gzip itself.
    """
    magic, new, has_begun = _COMPRESSIONS[name]
    decompressor: Any = None
    read, undecided = 0, b""  # bytes read; bytes too few to start a decompressor
    for piece in chain(pieces, [b""]):
        read += len(piece)
        last, piece, undecided = not piece, undecided + piece, b""
        while piece or not (decompressor is None or decompressor.needs_input or decompressor.eof):
            if decompressor is None or decompressor.eof:
                piece = piece.lstrip(b"\0") if name == "gzip" else piece
                if not (last or has_begun(piece)):
                    undecided = piece
                    break
                if not piece:
                    break
                if not magic.match(piece):
                    raise LengthwiseError(
                        f"{fasta}: broken {name}: garbage from byte {read - len(piece):,} on, after the end of the compressed "
                        f"data: {repr(piece[:40])[1:]}; remove it, or fetch or compress the file again"
                    )
                decompressor = new()
            try:
                yield decompressor.decompress(piece, BLOCK_BYTES)
            except _DAMAGED as error:
                where, what = f"damaged before byte {read:,} ({error})", "fetch or compress the file again"
                if "too much memory" in str(error):
                    where, what = (
                        f"its window is too large ({error})",
                        "compress the file again without --long",
                    )
                raise LengthwiseError(f"{fasta}: broken {name}: {where}; {what}") from error
            piece = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise LengthwiseError(
            f"{fasta}: broken {name}: cut short at byte {read:,}, in the middle of the data; fetch or compress the file again"
        )


def _as_blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join pieces to blocks of at least BLOCK_BYTES."""
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)


def _reported(on_raw_bytes: Callable[[bytes], None], pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        on_raw_bytes(piece)
        yield piece
