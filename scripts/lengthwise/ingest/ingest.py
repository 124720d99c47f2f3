"""Ingest: one FASTA file becomes a table of all its records and a table of its distinct sequences.

One pass, a chunk of records at a time. Eight bytes of each digest stay in memory, to find duplicates. Out-of-core queries over
the written table then check that those eight bytes were enough, and that no id names two sequences.
"""

import hashlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.fasta import place, read_chunks
from lengthwise.ingest.identity import input_stamp, require_same_content, stamps_with
from lengthwise.ingest.judge import Policy, judge_chunk
from lengthwise.ingest.nucleotides import NucleotideCounter
from lengthwise.ingest.repeats import DIGEST_WORDS, RepeatFinder, quoted, repeats_are_repeats, settle_ids
from lengthwise.ingest.tables import RECORDS, SEQUENCES, STATUS, WINDOWED, WINDOWS, TableWriter
from lengthwise.ingest.windows import cut_windows, windows_are_whole
from lengthwise.system.database import out_of_core
from lengthwise.system.files import atomic, facts, scratch_folder, write_json


def ingest(
    fasta: Path,
    records: Path,
    sequences: Path,
    summary: Path,
    policy: Policy | None = None,
    memory_bytes: int = 1 << 30,
    stamp: dict | None = None,
) -> dict:
    """Account for every record of a FASTA file.

    Parameters
    ----------
    fasta
        Plain, gzip or zstd-compressed, told apart by content.
    records, sequences, summary
        The Parquet tables and the JSON to write, in one folder: see `RECORDS` and `SEQUENCES`. With the policy `window`
        there is a third table beside them, `WINDOWS`: see `WINDOWED`.
    policy
        The policy for records that are not plain proteins.
    memory_bytes
        Memory of the queries over the whole table, which spill to disk beyond it.
    stamp
        The file's `lengthwise.ingest.identity.input_stamp` of before it is read; None takes it now.

    Returns
    -------
    The summary: counts by status, reason and change, the input's SHA-256 and stamps, size and SHA-256 of the tables.

    Raises
    ------
    LengthwiseError
        The dataset belongs to another file. The file cannot be read, is not FASTA, has one id for two different
        sequences, or breaks another rule of the policy.
    """
    policy, stamp, folder = policy or Policy(), stamp or input_stamp(fasta), summary.parent
    require_same_content(folder, stamp)
    with (
        atomic(records) as records_part,
        atomic(sequences) as sequences_part,
        atomic(folder / WINDOWS) if policy.long_policy == "window" else nullcontext() as windowed_part,
        scratch_folder(records.parent / ".spill") as spill,
        out_of_core("ingest", memory_bytes, spill, threads=1) as database,
    ):
        for word in range(DIGEST_WORDS):
            counts = _read(fasta, records_part, sequences_part, windowed_part, policy, word)
            if repeats_are_repeats(database, records_part, counts) and (
                windowed_part is None or windows_are_whole(database, records_part, sequences_part, windowed_part)
            ):
                break
        else:
            raise RuntimeError("two different digests agree in every eight-byte word; please report this file")
        settle_ids(database, fasta, records_part, counts, policy)
        parts = {records.name: records_part, sequences.name: sequences_part}
        parts |= {WINDOWS: windowed_part} if windowed_part else {}
        result = {
            "input": str(fasta),
            "inputs": stamps_with(folder, stamp, counts["input_sha256"]),
            **counts,
            "policy": asdict(policy),
            "files": {name: facts(part) for name, part in parts.items()},
        }
        write_json(summary, result)  # before the tables: other processes wait for these
    if windowed_part is None:
        (folder / WINDOWS).unlink(missing_ok=True)  # of an earlier policy
    return result


def _read(fasta: Path, records: Path, sequences: Path, windowed: Path | None, policy: Policy, word: int) -> dict:
    """Write the tables, finding duplicates by one word of their digests; returns the summary."""
    size, sha256, repeats, nucleotides = 0, hashlib.sha256(), RepeatFinder(), NucleotideCounter(fasta)
    status: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    rare: Counter[int] = Counter()
    residues, first_rejected = 0, None
    written = RepeatFinder()  # windows may be the same, and the same as a whole sequence

    def count_and_hash(raw: bytes) -> None:
        nonlocal size
        size += len(raw)
        sha256.update(raw)

    with (
        TableWriter(records, RECORDS) as record_table,
        TableWriter(sequences, SEQUENCES) as sequence_table,
        TableWriter(windowed, WINDOWED) if windowed else nullcontext() as windowed_table,
    ):
        for chunk in read_chunks(fasta, count_and_hash):
            first_no = status.total() + 1
            judged = judge_chunk(fasta, chunk, first_no, policy)
            accepted = judged.good.copy()
            accepted[judged.good] = ~repeats.find(judged.digests.view(np.uint64)[judged.good, word])
            nucleotides.count(judged.letters, judged.like_nucleotides, first_no)
            record_table.append(judged.records(first_no, accepted))
            if windowed_table:
                cut = cut_windows(judged, accepted, policy.window_residues, policy.overlap)
                windowed_table.append(cut.proteins)
                for rows in (judged.sequences().filter(pa.array(accepted & ~cut.chosen)), cut.windows):
                    keys = np.frombuffer(b"".join(rows["digest"].to_pylist()), np.uint64).reshape(-1, DIGEST_WORDS)
                    sequence_table.append(rows.filter(pa.array(~written.find(keys[:, word]))))
            else:
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
            f"{number} ({place(fasta, number)}), {quoted(record_id)}: {reason}; correct it, or set strict: false"
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
