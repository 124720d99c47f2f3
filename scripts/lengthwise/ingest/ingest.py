"""Ingest: one FASTA file becomes a table of all its records and a table of its distinct sequences.

One pass, a chunk of records at a time. What stays in memory of a record is eight bytes of its digest, to tell repeats; what
must be known of all records together (whether those eight bytes were enough, and whether an id stands for two sequences) is
asked of the table afterwards, out of core.
"""

import hashlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.fasta import place, read_chunks
from lengthwise.ingest.judge import Policy, judge
from lengthwise.ingest.nucleotides import Nucleotides
from lengthwise.ingest.repeats import DIGEST_WORDS, Seen, repeats_are_repeats, settle_ids, shown
from lengthwise.ingest.tables import RECORDS, SEQUENCES, STATUS, TableWriter
from lengthwise.system.database import out_of_core
from lengthwise.system.files import atomic, scratch_folder, write_json


def ingest(
    fasta: Path,
    records: Path,
    sequences: Path,
    summary: Path,
    policy: Policy | None = None,
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
    policy = policy or Policy()
    with (
        atomic(records) as records_part,
        atomic(sequences) as sequences_part,
        scratch_folder(records.parent / ".spill") as spill,
        out_of_core("ingest", memory_bytes, spill, threads=1) as database,
    ):
        for word in range(DIGEST_WORDS):
            counts = _read(fasta, records_part, sequences_part, policy, word)
            if repeats_are_repeats(database, records_part, counts):
                break
        else:
            raise RuntimeError("three times two digests had the same eight bytes; please report this file")
        settle_ids(database, fasta, records_part, counts, policy)
    result = {"input": str(fasta), **counts, "policy": asdict(policy)}
    write_json(summary, result)
    return result


def _read(fasta: Path, records: Path, sequences: Path, policy: Policy, word: int) -> dict:
    """Write the two tables, telling repeats by this word of their digests; returns the summary."""
    size, sha256, seen = 0, hashlib.sha256(), Seen()
    status, reasons, changes, rare, residues = Counter(), Counter(), Counter(), Counter(), 0
    first_rejected, nucleotides = None, Nucleotides(fasta)

    def read(raw: bytes) -> None:
        nonlocal size
        size += len(raw)
        sha256.update(raw)

    with TableWriter(records, RECORDS) as record_table, TableWriter(sequences, SEQUENCES) as sequence_table:
        for chunk in read_chunks(fasta, read):
            first_no = status.total() + 1
            judged = judge(fasta, chunk, first_no, policy)
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
            f"{number} ({place(fasta, number)}), {shown(record_id)}: {reason}; mend it, or set strict: false"
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
