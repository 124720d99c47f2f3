"""FASTA files like real ones, of any size, from a seed: UniProt's lengths, repeated sequences, defects.

``python tests/realistic.py 1000000 in.fasta`` writes one and prints what ingest should count.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lengthwise.ingest.tables import SEQUENCES

# Shares of the twenty amino acids in Swiss-Prot, in percent (https://web.expasy.org/docs/relnotes/relstat.html).
SHARES = dict(A=8.25, R=5.53, N=4.06, D=5.46, C=1.38, Q=3.93, E=6.72, G=7.07, H=2.27, I=5.91)
SHARES |= dict(L=9.65, K=5.80, M=2.41, F=3.86, P=4.74, S=6.65, T=5.36, W=1.10, Y=2.92, V=6.86)
# A log-normal of mean 360, as UniProt has it.
LOG_MEAN, LOG_SIGMA, SHORTEST, LONGEST = 5.64, 0.70, 20, 35_000
WIDTH = 60
POOL_LINES = 100_000

# Of so many records the last repeats the sequence before it, and one has a defect, each of them in turn.
REPEATED, DEFECTIVE = 10, 290
DEFECTS = [
    (lambda body: body.lower(), "changes", "uppercased"),
    (lambda body: body + b"*", "changes", "stop_stripped"),
    (lambda body: body[:9] + b"J" + body[10:], "changes", "j_to_x"),
    (lambda body: body[:9] + b" " + body[9:], "changes", "spaces_removed"),
    (lambda body: body[:9] + b"-" + body[10:], "reasons", "invalid_byte"),
    (lambda body: b"", "reasons", "empty"),
    (lambda body: b"X" * 50, "reasons", "all_x"),
]


def write(path: Path, records: int, seed: int = 0) -> dict:
    """Write a FASTA file; returns the part of ingest's summary that follows from it."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer("".join(SHARES).encode(), np.uint8)
    shares = np.array(list(SHARES.values()))
    pool = rng.choice(letters, (POOL_LINES, WIDTH), p=shares / shares.sum())
    pool = np.concatenate([pool, np.full((POOL_LINES, 1), ord("\n"), np.uint8)], axis=1).tobytes()
    expected = {"records": records, "accepted": 0, "duplicate": 0, "rejected": 0, "reasons": {}, "changes": {}}
    expected["residues"] = 0
    with open(path, "wb") as file:
        for first in range(0, records, 100_000):
            n = min(100_000, records - first)
            lengths = np.clip(np.exp(rng.normal(LOG_MEAN, LOG_SIGMA, n)).astype(int), SHORTEST, LONGEST)
            starts = rng.integers(0, POOL_LINES - LONGEST // WIDTH - 2, n) * (WIDTH + 1)
            parts = []
            for i, length, start in zip(range(first, first + n), lengths.tolist(), starts.tolist(), strict=True):
                repeats = i % REPEATED == REPEATED - 1
                if not repeats:  # the record's number, as letters, makes it a sequence of its own
                    body = _number(i) + pool[start + 8 : start + length + (length - 1) // WIDTH]
                    residues = length
                defect, rest = divmod(i, DEFECTIVE)
                header = b">tr|A%09d|A%09d_9ZZZZ Uncharacterized protein OS=Species %d OX=%d GN=gene_%d PE=4 SV=1\n"
                parts.append(header % (i, i, i % 977, i % 977, i))
                accepted = True
                if rest == 0:
                    change, kind, code = DEFECTS[defect % len(DEFECTS)]
                    parts.append(change(body))
                    expected[kind][code] = expected[kind].get(code, 0) + 1
                    accepted = kind == "changes"
                else:
                    parts.append(body)
                parts.append(b"\n")
                if not accepted:
                    expected["rejected"] += 1
                elif repeats:
                    expected["duplicate"] += 1
                else:
                    expected["accepted"] += 1
                    expected["residues"] += residues
            file.writelines(parts)
    return expected


def write_sequences(path: Path, n: int, seed: int = 0) -> None:
    """Write a table of so many short sequences as ingest does, with digests that are as random, but not theirs."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer("".join(SHARES).encode(), np.uint8)
    with pq.ParquetWriter(path, SEQUENCES, compression="none", use_dictionary=["length"]) as writer:
        for first in range(0, n, 65_536):
            lengths = np.clip(rng.gamma(5, 9, min(65_536, n - first)).astype(np.int32), 10, 400)  # 45 on average
            bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            residues = letters[rng.integers(0, len(letters), bounds[-1], np.uint8)]
            buffers = [None, pa.py_buffer(bounds), pa.py_buffer(residues)]
            digests = [None, pa.py_buffer(rng.bytes(24 * len(lengths)))]
            columns = [
                pa.Array.from_buffers(pa.binary(24), len(lengths), digests),
                pa.array(lengths),
                pa.Array.from_buffers(pa.binary(), len(lengths), buffers),
            ]
            writer.write_batch(pa.record_batch(columns, schema=SEQUENCES))


def _number(i: int) -> bytes:
    return bytes(b"ARNDCQEGHI"[int(digit)] for digit in f"{i:08d}")


if __name__ == "__main__":
    print(json.dumps(write(Path(sys.argv[2]), int(sys.argv[1]))))
