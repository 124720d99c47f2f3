"""Ingest: the FASTA files of a dataset become a table of all records and a table of the distinct sequences.

One pass, a chunk of records at a time. Eight bytes of each digest stay in memory, to find duplicates. Out-of-core queries over
the written table then check that those eight bytes were enough, and that no id names two sequences.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from lengthwise.errors import LengthwiseError
from lengthwise.ingest.fasta import place, read_chunks
from lengthwise.ingest.identity import input_stamp, require_same_content, stamps_with
from lengthwise.ingest.judge import Policy, judge_chunk
from lengthwise.ingest.nucleotides import NucleotideCounter
from lengthwise.ingest.repeats import DIGEST_WORDS, RepeatFinder, quoted, repeats_are_repeats, settle_ids
from lengthwise.ingest.sources import Source, Sources
from lengthwise.ingest.tables import FILE, RECORDS, SEQUENCES, STATUS, WINDOWED, WINDOWS, TableWriter
from lengthwise.ingest.windows import cut_windows, windows_are_whole
from lengthwise.system.database import out_of_core
from lengthwise.system.files import atomic, facts, scratch_folder, write_json


def ingest(
    fasta: Path | Sequence[Path],
    records: Path,
    sequences: Path,
    summary: Path,
    policy: Policy | None = None,
    memory_bytes: int = 1 << 30,
    stamps: list[dict] | None = None,
) -> dict:
    """Account for every record of a dataset's FASTA files.

    Parameters
    ----------
    fasta
        The file, or several in order: plain, gzip or zstd-compressed, told apart by content.
    records, sequences, summary
        The Parquet tables and the JSON to write, in one folder: see `RECORDS` and `SEQUENCES`. With the policy `window`
        there is a third table beside them, `WINDOWS`: see `WINDOWED`.
    policy
        The policy for records that are not plain proteins.
    memory_bytes
        Memory of the queries over the whole table, which spill to disk beyond it.
    stamps
        The files' `lengthwise.ingest.identity.input_stamp` of before they are read; None takes them now.

    Returns
    -------
    The summary: counts by status, reason and change, the input's SHA-256 and stamps, size and SHA-256 of the tables.

    Raises
    ------
    LengthwiseError
        The dataset belongs to other files. A file cannot be read, is not FASTA, or breaks a rule of the policy; or one id
        names two different sequences.
    """
    files = [fasta] if isinstance(fasta, Path) else list(fasta)
    policy, stamps, folder = policy or Policy(), stamps or [input_stamp(file) for file in files], summary.parent
    require_same_content(folder, stamps)
    with (
        atomic(records) as records_part,
        atomic(sequences) as sequences_part,
        atomic(folder / WINDOWS) if policy.long_policy == "window" else nullcontext() as windowed_part,
        scratch_folder(records.parent / ".spill") as spill,
        out_of_core("ingest", memory_bytes, spill, threads=1) as database,
    ):
        for word in range(DIGEST_WORDS):
            counts, sources = _read(files, records_part, sequences_part, windowed_part, policy, word)
            if repeats_are_repeats(database, records_part, counts) and (
                windowed_part is None or windows_are_whole(database, records_part, sequences_part, windowed_part)
            ):
                break
        else:
            raise RuntimeError("two different digests agree in every eight-byte word; please report this file")
        settle_ids(database, sources, records_part, counts, policy)
        parts = {records.name: records_part, sequences.name: sequences_part}
        parts |= {WINDOWS: windowed_part} if windowed_part else {}
        result = {
            "inputs": stamps_with(folder, stamps, sources.summary()["input_sha256"]),
            **sources.summary(),
            **counts,
            "policy": asdict(policy),
            "files": {name: facts(part) for name, part in parts.items()},
        }
        write_json(summary, result)  # before the tables: other processes wait for these
    if windowed_part is None:
        (folder / WINDOWS).unlink(missing_ok=True)  # of an earlier policy
    return result


def _read(
    files: list[Path], records: Path, sequences: Path, windowed: Path | None, policy: Policy, word: int
) -> tuple[dict, Sources]:
    """Write the tables, finding duplicates by one word of their digests; returns the counts, and what was read."""
    sources, repeats = Sources(), RepeatFinder()
    status: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    rare: Counter[int] = Counter()
    residues, first_rejected = 0, None
    written = RepeatFinder()  # windows may be the same, and the same as a whole sequence
    schema = RECORDS if len(files) == 1 else RECORDS.append(FILE)
    with (
        TableWriter(records, schema) as record_table,
        TableWriter(sequences, SEQUENCES) as sequence_table,
        TableWriter(windowed, WINDOWED) if windowed else nullcontext() as windowed_table,
    ):
        for fasta in files:
            source, nucleotides = Source(fasta, before=status.total()), NucleotideCounter(fasta, partial(place, fasta))
            sources.read.append(source)
            for chunk in read_chunks(fasta, source.add):
                first_no = status.total() + 1
                own_no = first_no - source.before
                judged = judge_chunk(fasta, chunk, own_no, policy)
                accepted = judged.good.copy()
                accepted[judged.good] = ~repeats.find(judged.digests.view(np.uint64)[judged.good, word])
                nucleotides.count(judged.letters, judged.like_nucleotides, own_no)
                record_table.append(_with_file(judged.records(first_no, accepted), fasta, schema))
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
            source.records = status.total() - source.before
    if first_rejected and policy.strict:
        number, record_id, reason = first_rejected
        fasta, own_no = sources.locate(number)
        whose = "its records" if len(files) == 1 else f"the records of {len(files)} files"
        raise LengthwiseError(
            f"{fasta}: {status['rejected']:,} of {whose} would be rejected, and strict is true; the first is record "
            f"{own_no} ({sources.place(number)}), {quoted(record_id)}: {reason}; correct it, or set strict: false"
        )
    counts = {
        "records": status.total(),
        **{name: status[name] for name in STATUS},
        "reasons": dict(reasons),
        "changes": dict(changes),
        "residues": residues,
        "rare_residues": {chr(letter): count for letter, count in sorted(rare.items())},
    }
    return counts, sources


def _with_file(rows: pa.RecordBatch, fasta: Path, schema: pa.Schema) -> pa.RecordBatch:
    """The rows with the columns of a schema: its `file` is this one."""
    columns = rows.columns if len(schema) == len(rows.schema) else [*rows.columns, pa.repeat(str(fasta), len(rows))]
    return pa.record_batch(columns, schema=schema)
