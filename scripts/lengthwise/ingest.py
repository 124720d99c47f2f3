"""Ingest: one FASTA file becomes a table of all its records and a table of its distinct sequences.

One pass, a chunk of records at a time. What stays in memory of a record is eight bytes of its digest, to tell repeats; what
must be known of all records together (whether those eight bytes were enough, and whether an id stands for two sequences) is
asked of the table afterwards, out of core.
"""

import hashlib
import string
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lengthwise import alphabet
from lengthwise.database import out_of_core
from lengthwise.errors import LengthwiseError
from lengthwise.fasta import (
    joined,
    joined_lines,
    place,
    read_chunks,
    refuse_another_file,
    split_headers,
    split_records,
)
from lengthwise.files import atomic, scratch_folder, write_json
from lengthwise.nucleotides import Nucleotides, look_alike, suspects

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
ROWS_PER_GROUP, BYTES_PER_GROUP = 65_536, 1 << 26

STATUS = ("accepted", "duplicate", "rejected")
DIGEST_WORDS = 3  # of eight bytes

NO_ID = "no_id"
TOO_LONG = "too_long"
ID_SUFFIXED = "id_suffixed"
LIKE_NUCLEOTIDES = "like_nucleotides"

_NO_LETTERS = bytes(set(range(256)) - set(string.ascii_letters.encode()))
_OTHER_CAPITALS = set(range(ord("A"), ord("Z") + 1)) - set(alphabet.STANDARD)


@dataclass(frozen=True)
class Policy:
    """What becomes of records that are not plain proteins; the config's keys of these names say what each value does."""

    letters: alphabet.Letters = field(default_factory=alphabet.Letters)
    long_policy: str = "full"
    max_residues: int = 1022
    duplicate_ids: str = "error"
    nucleotides: str = "refuse"
    strict: bool = False


def ingest(
    fasta: Path,
    records: Path,
    sequences: Path,
    summary: Path,
    policy: Policy = Policy(),
    memory_bytes: int = 1 << 30,
) -> dict:
    """Account for every record of a FASTA file.

    Parameters
    ----------
    fasta
        Plain, gzip or zstd-compressed, told apart by content.
    records, sequences, summary
        The Parquet tables and the JSON to write, in one folder: see `RECORDS` and `SEQUENCES`.
    policy
        What becomes of records that are not plain proteins.
    memory_bytes
        What the questions to the whole table may take before they spill to disk.

    Returns
    -------
    The summary: counts by status, reason and change, and the input's SHA-256.

    Raises
    ------
    LengthwiseError
        The file cannot be read, is not FASTA, has one id for two different sequences, or breaks another rule of the policy.
    """
    with (
        atomic(records) as records_part,
        atomic(sequences) as sequences_part,
        scratch_folder(records.parent / ".spill") as spill,
        out_of_core("ingest", memory_bytes, spill, threads=1) as database,
    ):
        for word in range(DIGEST_WORDS):
            counts = _read(fasta, records_part, sequences_part, policy, word)
            if _repeats_are_repeats(database, records_part, counts):
                break
        else:
            raise RuntimeError("three times two digests had the same eight bytes; please report this file")
        _settle_ids(database, fasta, records_part, counts, policy)
    result = {"input": str(fasta), **counts, "policy": asdict(policy)}
    write_json(summary, result)
    return result


def _read(fasta: Path, records: Path, sequences: Path, policy: Policy, word: int) -> dict:
    """Write the two tables, telling repeats by this word of their digests; returns the summary."""
    size, sha256, seen = 0, hashlib.sha256(), _Seen()
    status, reasons, changes, rare, residues = Counter(), Counter(), Counter(), Counter(), 0
    first_rejected, nucleotides = None, Nucleotides(fasta)

    def read(raw: bytes) -> None:
        nonlocal size
        size += len(raw)
        sha256.update(raw)

    with _Table(records, RECORDS) as record_table, _Table(sequences, SEQUENCES) as sequence_table:
        for chunk in read_chunks(fasta, read):
            first_no = status.total() + 1
            judged = _judge(fasta, chunk, first_no, policy)
            accepted = judged.good.copy()
            accepted[judged.good] = ~seen.add(judged.digests.view(np.uint64)[judged.good, word])
            nucleotides.count(judged.letters, judged.like_nucleotides, first_no)
            record_table.append(judged.records(first_no, accepted))
            sequence_table.append(judged.sequences().filter(pa.array(accepted)))
            residues += int(judged.lengths[accepted].sum())
            status.update(accepted=int(accepted.sum()), rejected=int((~judged.good).sum()))
            status["duplicate"] += int((judged.good & ~accepted).sum())
            for i, reason in sorted(judged.reasons.items()):
                reasons[reason.split(":")[0]] += 1
                first_rejected = first_rejected or (first_no + i, judged.ids[i].as_py(), reason)
            for names in judged.changed.values():
                changes.update(names)
            rare.update(judged.rare)
    nucleotides.decide()
    if first_rejected and policy.strict:
        number, record_id, reason = first_rejected
        raise LengthwiseError(
            f"{fasta}: {status['rejected']:,} of its records would be rejected, and strict is true; the first is record "
            f"{number} ({place(fasta, number)}), {_shown(record_id)}: {reason}; mend it, or set strict: false"
        )
    return {
        "input_bytes": size,
        "input_sha256": sha256.hexdigest(),
        "records": status.total(),
        **{name: status[name] for name in STATUS},
        "reasons": dict(reasons),
        "changes": dict(changes),
        "residues": residues,
        "rare_residues": {chr(letter): count for letter, count in sorted(rare.items())},
    }


@dataclass
class _Judged:
    """The records of one chunk; `residues` holds their sequences end to end, those rejected for their letters empty."""

    ids: pa.Array
    descriptions: pa.Array
    residues: bytes
    bounds: np.ndarray
    digests: np.ndarray
    lengths: np.ndarray
    reasons: dict[int, str]
    changed: dict[int, list[str]]
    rare: Counter
    letters: int
    like_nucleotides: dict[int, int]  # the letters of such records

    def __post_init__(self):
        self.good = np.ones(len(self.ids), bool)
        self.good[list(self.reasons)] = False

    def records(self, first_no: int, accepted: np.ndarray) -> pa.RecordBatch:
        n = len(self.ids)
        fates = np.where(self.good, np.where(accepted, 0, 1), 2).astype(np.int8)
        changes = {i: ",".join(names) for i, names in self.changed.items()}
        columns = [
            pa.array(np.arange(first_no, first_no + n)),
            self.ids,
            self.descriptions,
            self._digest_column(self.good),
            pa.array(self.lengths),
            pa.DictionaryArray.from_arrays(fates, pa.array(STATUS)).cast(pa.string()),
            _mostly_empty(self.reasons, n),
            _mostly_empty(changes, n),
        ]
        return pa.record_batch(columns, schema=RECORDS)

    def sequences(self) -> pa.RecordBatch:
        bounds, residues = pa.py_buffer(self.bounds.astype(np.int32)), pa.py_buffer(self.residues)
        column = pa.Array.from_buffers(pa.binary(), len(self.ids), [None, bounds, residues])
        return pa.record_batch([self._digest_column(None), pa.array(self.lengths), column], schema=SEQUENCES)

    def _digest_column(self, valid: np.ndarray | None) -> pa.Array:
        bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
        return pa.Array.from_buffers(pa.binary(24), len(self.ids), [bits, pa.py_buffer(self.digests)])


def _judge(fasta: Path, chunk: bytes, first_no: int, policy: Policy) -> _Judged:
    """Judge each record by itself; only those with another letter than the twenty amino acids are taken one by one."""
    headers, lines, first = split_records(chunk)
    ids, descriptions = split_headers(headers)
    residues, line_bounds = joined(lines)
    bounds = line_bounds[first]
    lengths = np.diff(bounds).astype(np.int32)
    judged_by = {i: residues[bounds[i] : bounds[i + 1]] for i in suspects(residues, bounds)}
    mended, reasons, changed, rare, letters = {}, {}, {}, Counter(), len(residues)
    for i in _unusual(residues, bounds):
        own_lines = lines[first[i] : first[i + 1]].to_pylist()
        raw = joined_lines(own_lines)
        sequence, changes, reason = alphabet.normalize(raw, policy.letters)
        letters -= int(lengths[i])
        judged_by[i] = raw.translate(None, _NO_LETTERS)
        letters += len(judged_by[i])
        lengths[i], mended[i] = len(sequence), b"" if reason else sequence
        if reason:
            reasons[i] = reason
            refuse_another_file(fasta, lambda i=i: first_no + i, b"\n" + b"\n".join(own_lines))
        if changes:
            changed[i] = changes
    like = {}
    if policy.nucleotides == "refuse":
        like = {i: len(own) for i, own in judged_by.items() if look_alike(own)}
    if policy.long_policy == "skip":
        for i in np.flatnonzero(lengths > policy.max_residues).tolist():
            reasons.setdefault(i, f"{TOO_LONG}: {lengths[i]} residues, more than max_residues = {policy.max_residues}")
    for i in np.flatnonzero(pc.binary_length(ids).to_numpy() == 0).tolist():
        reasons[i] = NO_ID
    for i in mended:
        if i in reasons:
            changed.pop(i, None)
        else:
            rare.update(mended[i].translate(None, alphabet.STANDARD))
    residues, bounds = _replaced(residues, bounds, mended)
    digests = alphabet.digests(residues, bounds)
    for i in like.keys() - reasons.keys():
        changed.setdefault(i, []).append(LIKE_NUCLEOTIDES)
    judged = _Judged(ids, descriptions, residues, bounds, digests, lengths, reasons, changed, rare, letters, like)
    if not alphabet.is_tokens(residues) or (np.diff(bounds) != lengths)[judged.good].any():
        raise RuntimeError("a residue would have no token of its own; please report this file")
    return judged


def _unusual(residues: bytes, bounds: np.ndarray) -> list[int]:
    """The records that are empty, or have a byte in them that is none of the twenty amino acids."""
    no_capitals = (np.frombuffer(residues, np.uint8) - ord("A") > ord("Z") - ord("A")).tobytes()
    found, edges = set(np.flatnonzero(np.diff(bounds) == 0).tolist()), bounds.tolist()
    for text, byte in [(no_capitals, 1), *((residues, letter) for letter in _OTHER_CAPITALS)]:
        at = text.find(byte)
        while at >= 0:
            i = bisect_right(edges, at) - 1
            found.add(i)
            at = text.find(byte, edges[i + 1])
    return sorted(found)


def _replaced(residues: bytes, bounds: np.ndarray, mended: dict[int, bytes]) -> tuple[bytes, np.ndarray]:
    """The residues with these records' instead of their own, and the new bounds."""
    parts, end, lengths = [], 0, np.diff(bounds)
    for i, sequence in mended.items():
        parts += [residues[end : bounds[i]], sequence]
        end, lengths[i] = bounds[i + 1], len(sequence)
    return b"".join([*parts, residues[end:]]), np.concatenate([[0], np.cumsum(lengths)])


class _Seen:
    """Which keys came before: sorted runs, each at least four times as long as the next, eight bytes a key."""

    def __init__(self):
        self.runs: list[np.ndarray] = []

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Whether each key is a repeat; from now on all of them are known."""
        if not len(keys):
            return np.zeros(0, bool)
        order = np.argsort(keys)  # not a stable sort, which takes longer: the first of equal keys has the least number
        keys = keys[order]
        starts = np.append(0, np.flatnonzero(np.diff(keys)) + 1)
        first, keys = np.minimum.reduceat(order, starts), keys[starts]
        known = np.zeros(len(keys), bool)
        for run in self.runs:
            known |= run[np.searchsorted(run[:-1], keys)] == keys
        if not known.all():
            self.runs.append(keys[~known])
        while len(self.runs) > 1 and len(self.runs[-2]) < 4 * len(self.runs[-1]):
            self.runs[-2:] = [np.sort(np.concatenate(self.runs[-2:]), kind="stable")]  # merges what is sorted already
        repeats = np.ones(len(order), bool)
        repeats[first] = known
        return repeats


def _repeats_are_repeats(database: duckdb.DuckDBPyConnection, records: Path, counts: dict) -> bool:
    """Whether every duplicate has the whole digest of an accepted record, and not only a word of it."""
    if not counts["duplicate"]:
        return True
    database.execute(
        "CREATE OR REPLACE TABLE repeated AS SELECT DISTINCT digest FROM read_parquet(?) WHERE status = 'duplicate'",
        [str(records)],
    )
    ((found,),) = database.execute(
        "SELECT count(*) = (SELECT count(*) FROM repeated) FROM read_parquet(?) SEMI JOIN repeated USING (digest)"
        " WHERE status = 'accepted'",
        [str(records)],
    ).fetchall()
    return found


def _settle_ids(database: duckdb.DuckDBPyConnection, fasta: Path, records: Path, counts: dict, policy: Policy) -> None:
    """One id must not stand for two sequences, reading by id could not tell them apart: refuse it, or rename the later."""
    database.execute(
        "CREATE TABLE shared AS SELECT hash(id) AS key FROM read_parquet(?) GROUP BY key HAVING count(*) > 1",
        [str(records)],
    )
    database.execute(
        "CREATE TABLE suspects AS SELECT record_no, id, coalesce(digest, ''::BLOB) AS variant FROM read_parquet(?)"
        " WHERE hash(id) IN (FROM shared)",
        [str(records)],
    )
    database.execute(
        "CREATE TABLE renamed AS WITH"
        " variants AS (SELECT id, variant, min(record_no) AS first FROM suspects GROUP BY ALL),"
        " numbered AS (SELECT *, row_number() OVER (PARTITION BY id ORDER BY first) AS number,"
        "   min(first) OVER (PARTITION BY id) AS other FROM variants)"
        " SELECT record_no, id AS old, id || '_' || number AS new, other FROM suspects JOIN numbered USING (id, variant)"
        " WHERE number > 1"
    )
    found = database.execute("SELECT other, record_no, old FROM renamed ORDER BY record_no LIMIT 1").fetchall()
    if not found:
        return
    ((one, other, record_id),) = found
    if policy.duplicate_ids == "error":
        raise LengthwiseError(
            f"{fasta}: records {one} and {other} have the same id {_shown(record_id)} and different sequences "
            f"({place(fasta, one)}; {place(fasta, other)}); rename one of them, or set duplicate_ids: suffix"
        )
    taken = database.execute(
        "SELECT renamed.record_no, old, new, old_ones.record_no FROM read_parquet(?) AS old_ones JOIN renamed ON id = new"
        " LIMIT 1",
        [str(records)],
    ).fetchall()
    for number, old, new, other in taken:
        raise LengthwiseError(
            f"{fasta}: record {number}, {_shown(old)}, should be renamed to {_shown(new)}, which record {other} is called "
            "already; rename one of them"
        )
    counts["changes"][ID_SUFFIXED] = _rename(database, records)


def _rename(database: duckdb.DuckDBPyConnection, records: Path) -> int:
    """Write the records again with their new ids; returns how many have one."""
    renamed = database.sql("SELECT record_no, new FROM renamed ORDER BY record_no").to_arrow_table()
    numbers, new = renamed.column("record_no").to_numpy(), renamed.column("new")
    with atomic(records) as part, _Table(part, RECORDS) as table:
        for batch in pq.ParquetFile(records, pre_buffer=False).iter_batches(ROWS_PER_GROUP):
            first = batch.column("record_no")[0].as_py()
            low, high = np.searchsorted(numbers, [first, first + len(batch)])
            ids, changes = batch.column("id").to_pylist(), batch.column("changes").to_pylist()
            for i, name in zip((numbers[low:high] - first).tolist(), new[low:high].to_pylist(), strict=True):
                ids[i], changes[i] = name, ",".join(filter(None, [changes[i], ID_SUFFIXED]))
            for name, column in (("id", ids), ("changes", changes)):
                batch = batch.set_column(RECORDS.get_field_index(name), name, pa.array(column, pa.string()))
            table.append(batch)
    return len(renamed)


def _mostly_empty(values: dict[int, str], n: int) -> pa.Array:
    """A column of n strings: these, and empty ones."""
    numbers = np.zeros(n, np.int32)
    numbers[list(values)] = range(1, len(values) + 1)
    return pa.DictionaryArray.from_arrays(numbers, pa.array(["", *values.values()], pa.string())).cast(pa.string())


def _shown(record_id: str) -> str:
    return repr(record_id if len(record_id) <= 80 else record_id[:77] + "...")


class _Table:
    """Batches into a Parquet file, many to a row group. Digests and sequences would hardly shrink, so they are left plain."""

    REPETITIVE = ("length", "status", "reason", "changes")
    COMPRESSED = ("id", "description", "reason")

    def __init__(self, path: Path, schema: pa.Schema):
        self.writer = pq.ParquetWriter(
            path,
            schema,
            compression={name: "zstd" if name in self.COMPRESSED else "none" for name in schema.names},
            use_dictionary=[name for name in schema.names if name in self.REPETITIVE],
            column_encoding={"record_no": "DELTA_BINARY_PACKED"} if "record_no" in schema.names else None,
            write_statistics=False,
        )
        self.schema = schema
        self.batches: list[pa.RecordBatch] = []

    def append(self, batch: pa.RecordBatch) -> None:
        self.batches.append(batch)
        if sum(map(len, self.batches)) >= ROWS_PER_GROUP or sum(b.nbytes for b in self.batches) >= BYTES_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        self.writer.write_table(pa.Table.from_batches(self.batches, self.schema))
        self.batches = []

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.flush()
        self.writer.close()
