"""The h5 export: UniProt's layout."""

import re
from pathlib import Path

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.export.hdf5 import HDF5File
from lengthwise.export.source import Source

# UniProt's ids are database|accession|name.
_ACCESSION = r"^(?:sp|tr)\|([^|]+)\|"

# What an HDF5 name cannot hold, and the sign that stands for it.
_UNNAMEABLE = re.compile(r"[/%\0]|^\.$")


def write_h5(source: Source, folder: Path, names: list[str]) -> int:
    shared = source.shared(f"coalesce(nullif(regexp_extract(id, '{_ACCESSION}', 1), ''), id)")
    about = {**source.origin, "layer": source.layer}
    n = 0
    with HDF5File(folder / "per-residue.h5", about) as residues, HDF5File(folder / "per-protein.h5", about) as means:
        for protein in source.proteins(names):
            n += 1
            key = h5_key(protein.id, shared)
            for name, file in zip(names, (residues, means), strict=True):
                file.create(key, _half(protein.stored[name], protein.id), protein.id)
    return n


def h5_key(record_id: str, shared: set[str] = frozenset()) -> str:
    """The name of a record's array in the h5 export: its accession; its whole id where that is none, or another id has it too.

    ``/``, ``%`` and NUL, and ``.`` alone, are percent-encoded: `urllib.parse.unquote` gives them back.

    >>> h5_key("sp|P69905|HBA_HUMAN"), h5_key("a/b")
    ('P69905', 'a%2Fb')
    """
    accession = re.match(_ACCESSION, record_id)
    key = accession[1] if accession and record_id not in shared else record_id
    return _UNNAMEABLE.sub(lambda found: f"%{ord(found[0]):02X}", key)


def _half(array: np.ndarray, record_id: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise LengthwiseError(
            f"record {record_id[:100]!r} has numbers beyond float16's range, which is the type of the h5 export; take h5 out of "
            "'exports': biotrainer and parquet keep them as they are"
        )
    return half
