"""Ingest: one FASTA file becomes a table of all its records and a table of its distinct sequences."""

import gzip
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from Bio.SeqIO.FastaIO import SimpleFastaParser

from lengthwise import alphabet
from lengthwise.errors import LengthwiseError
from lengthwise.files import atomic, sha256, write_json

RECORDS = pa.schema(
    [
        ("record_no", pa.int64()),
        ("id", pa.string()),
        ("description", pa.string()),
        ("digest", pa.binary(24)),
        ("length", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("changes", pa.string()),
    ]
)
SEQUENCES = pa.schema([("digest", pa.binary(24)), ("length", pa.int32()), ("sequence", pa.binary())])
ROWS_PER_GROUP = 65_536

TOO_LONG = "too_long"

_SPACE = "\N{SYMBOL FOR SPACE}"
_MAGIC = {
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it first",
    b"BZh": "bzip2-compressed; decompress it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\xfd7zXZ": "xz-compressed; decompress it first",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}


def ingest(
    fasta: Path, records: Path, sequences: Path, summary: Path, long_policy: str = "full", max_residues: int = 1022
) -> dict:
    """Account for every record of a FASTA file.

    Parameters
    ----------
    fasta
        Plain or gzip-compressed, told apart by content.
    records, sequences, summary
        The Parquet tables and the JSON to write: see `RECORDS` and `SEQUENCES`.
    long_policy
        ``full`` embeds every length; ``skip`` rejects sequences of more than `max_residues`.

    Returns
    -------
    The summary: counts by status and by reason, and the input's SHA-256.

    Raises
    ------
    LengthwiseError
        The file cannot be read, is not FASTA, holds no record, or has one id for two different sequences.
    """
    status, reasons, changed = Counter(), Counter(), Counter()
    residues = 0
    seen: set[bytes] = set()
    first_of_id: dict[str, tuple[int, bytes | None]] = {}
    with atomic(records) as records_part, atomic(sequences) as sequences_part:
        with _Table(records_part, RECORDS) as record_table, _Table(sequences_part, SEQUENCES) as sequence_table:
            for record_no, (header, raw) in enumerate(read_records(fasta), start=1):
                words = header.split(maxsplit=1)
                record_id = words[0] if words else ""
                description = words[1] if len(words) > 1 else ""
                sequence, changes, reason = alphabet.normalize(raw)
                if not record_id:
                    reason = "no_id"
                elif not reason and long_policy == "skip" and len(sequence) > max_residues:
                    reason = f"{TOO_LONG}: {len(sequence)} residues, more than max_residues = {max_residues}"
                digest = None if reason else alphabet.digest(sequence)
                _refuse_ambiguous_id(fasta, record_id, record_no, digest, first_of_id)
                if reason:
                    verdict = "rejected"
                    reasons[reason.split(":")[0]] += 1
                elif digest in seen:
                    verdict = "duplicate"
                else:
                    verdict = "accepted"
                    seen.add(digest)
                    residues += len(sequence)
                    sequence_table.append((digest, len(sequence), sequence))
                status[verdict] += 1
                changed.update(changes)
                record_table.append(
                    (record_no, record_id, description, digest, len(sequence), verdict, reason, ",".join(changes))
                )
        if not status:
            raise LengthwiseError(f"{fasta}: no record in it; a FASTA file has lines that begin with '>'")
    result = {
        "input": str(fasta),
        "input_bytes": fasta.stat().st_size,
        "input_sha256": sha256(fasta),
        "records": status.total(),
        "accepted": status["accepted"],
        "duplicate": status["duplicate"],
        "rejected": status["rejected"],
        "reasons": dict(reasons),
        "changes": dict(changed),
        "residues": residues,
    }
    write_json(summary, result)
    return result


def read_records(fasta: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (header without ``>``, raw sequence) of every record of a plain or gzip-compressed FASTA file."""
    try:
        with open(fasta, "rb") as raw:
            start = raw.read(8)
            raw.seek(0)
            for magic, what in _MAGIC.items():
                if start.startswith(magic):
                    raise LengthwiseError(f"{fasta}: this file is {what}")
            stream = gzip.GzipFile(fileobj=raw) if start.startswith(b"\x1f\x8b") else raw
            # utf-8-sig drops a byte-order mark; bytes that are not UTF-8 stay visible as \xNN.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="backslashreplace")
            first = next((line for line in text if line.strip()), None)
            if first is None:
                raise LengthwiseError(f"{fasta}: the file is empty; give a FASTA file, or take it out of 'inputs'")
            if not first.startswith(">"):
                raise LengthwiseError(
                    f"{fasta}: not FASTA: the first line is {first.strip()[:40]!r}, and should begin with '>'"
                )
            lines = (_spaces_kept(line) for line in itertools.chain([first], text))
            for header, sequence in SimpleFastaParser(lines):
                yield header, sequence.replace(_SPACE, " ").encode("utf-8")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LengthwiseError(f"{fasta}: broken gzip ({error}); fetch or compress the file again") from error
    except OSError as error:
        raise LengthwiseError(f"{fasta}: cannot be read: {error.strerror or error}") from error


def _spaces_kept(line: str) -> str:
    """Biopython drops spaces inside a sequence, and with them every later residue's position: hide them from it."""
    return line if line.startswith(">") else line.rstrip().replace(" ", _SPACE) + "\n"


def _refuse_ambiguous_id(fasta, record_id, record_no, digest, first_of_id):
    """One id must not stand for two sequences: reading by id could not tell them apart."""
    first_no, first_digest = first_of_id.setdefault(record_id, (record_no, digest))
    if digest != first_digest:
        raise LengthwiseError(
            f"{fasta}: records {first_no} and {record_no} have the same id {record_id!r} and different sequences; "
            "rename one of them"
        )


class _Table:
    """Rows into a Parquet file, a group at a time."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.schema = schema
        self.writer = pq.ParquetWriter(path, schema, compression="zstd")
        self.rows: list[tuple] = []

    def append(self, row: tuple) -> None:
        self.rows.append(row)
        if len(self.rows) == ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        columns = zip(*self.rows, strict=True) if self.rows else [[] for _ in self.schema]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        self.writer.write_table(pa.table(arrays, schema=self.schema))
        self.rows.clear()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.flush()
        self.writer.close()
