"""The identity of a sequence: its GA4GH refget digest."""

import base64
import hashlib
from itertools import pairwise

import numpy as np


def digest(sequence: bytes) -> bytes:
    """GA4GH refget's sha512t24u of an uppercase sequence: the first 24 bytes of its SHA-512.

    Source: GA4GH refget v2, https://samtools.github.io/hts-specs/refget.html
    """
    return hashlib.sha512(sequence).digest()[:24]


def digest_all(residues: bytes, bounds: np.ndarray) -> np.ndarray:
    """The digests of sequences that lie end to end between these bounds, as uint8 of n rows and 24 columns."""
    new, long = hashlib.sha512().copy, []  # a copy of what is there is made faster than a new one
    for start, stop in pairwise(bounds.tolist()):
        sha512 = new()
        sha512.update(residues[start:stop])
        long.append(sha512.digest())
    long = b"".join(long)
    return np.ascontiguousarray(np.frombuffer(long, np.uint8).reshape(-1, 64)[:, :24])


def digest_name(raw: bytes) -> str:
    """A digest as people write it: ``SQ.`` and base64url."""
    return "SQ." + base64.urlsafe_b64encode(raw).decode()
