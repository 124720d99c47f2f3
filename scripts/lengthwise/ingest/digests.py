"""The identity of a sequence: its GA4GH refget digest."""

import base64
import hashlib
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def digest(sequence: bytes) -> bytes:
    """GA4GH refget's sha512t24u of an uppercase sequence: the first 24 bytes of its SHA-512.

    Source: GA4GH refget v2, https://samtools.github.io/hts-specs/refget.html
    """
    return hashlib.sha512(sequence).digest()[:24]


def digest_all(residues: bytes, bounds: np.ndarray) -> np.ndarray:
    """The digests of many sequences.

    Parameters
    ----------
    residues
        All sequences, end to end.
    bounds
        [n + 1]; sequence i is ``residues[bounds[i]:bounds[i + 1]]``.

    Returns
    -------
    [n, 24] uint8
    """
    new, digests = hashlib.sha512().copy, []  # a copy costs less than a new hash
    for start, stop in pairwise(bounds.tolist()):
        sha512 = new()
        sha512.update(residues[start:stop])
        digests.append(sha512.digest())
    return np.ascontiguousarray(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 64)[:, :24])


def digest_name(raw: bytes) -> str:
    """A digest in its text form: ``SQ.`` and base64url."""
    return "SQ." + base64.urlsafe_b64encode(raw).decode()


def digest_names(digests: pa.ChunkedArray) -> pa.LargeStringArray:
    """`digest_name` of each of the [n] digests; null stays null."""
    given = pc.is_valid(digests)
    names = np.empty((pc.sum(given).as_py() or 0, len("SQ.") + 32), np.uint8)
    names[:, :3] = np.frombuffer(b"SQ.", np.uint8)
    raw = b"".join(digests.drop_null().to_pylist())
    names[:, 3:] = np.frombuffer(base64.urlsafe_b64encode(raw), np.uint8).reshape(-1, 32)
    ends = np.append(0, np.cumsum(given.to_numpy().astype(np.int64) * names.shape[1]))
    buffers = [pa.py_buffer(np.packbits(given.to_numpy(), bitorder="little")), pa.py_buffer(ends), pa.py_buffer(names)]
    return pa.LargeStringArray.from_buffers(len(digests), buffers[1], buffers[2], buffers[0])
