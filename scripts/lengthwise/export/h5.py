"""The h5 export: UniProt's layout, two HDF5 files with an array for each accession."""

import re
from collections.abc import Set
from pathlib import Path

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.export.hdf5 import HDF5File
from lengthwise.export.source import Source
from lengthwise.store.accessions import ACCESSION, accession

# Characters that an HDF5 name cannot have, and the sign of percent-encoding.
_UNNAMEABLE = re.compile(r"[/%\0]|^\.$")


def write_h5(source: Source, folder: Path, names: list[str]) -> int:
    """Write `per-residue.h5` and `per-protein.h5` into `folder`. Returns the number of entries."""
    ambiguous = source.ids_sharing(f"coalesce(nullif(regexp_extract(id, '{ACCESSION}', 1), ''), id)")
    about = {**source.origin, "layer": source.layer}
    n = 0
    with HDF5File(folder / "per-residue.h5", about) as residues, HDF5File(folder / "per-protein.h5", about) as means:
        for protein in source.proteins(names):
            n += 1
            key = h5_key(protein.id, ambiguous)
            for name, file in zip(names, (residues, means), strict=True):
                file.create(key, _to_float16(protein.stored[name], protein.id), protein.id)
    return n


def h5_key(record_id: str, ambiguous: Set[str] = frozenset()) -> str:
    """The name of a record's array in the h5 export: its accession.

    An id without an accession, or one of `ambiguous` (ids that share their accession with others), is used as a whole.
    ``/``, ``%`` and NUL, and ``.`` alone, are percent-encoded; `urllib.parse.unquote` decodes them.

    >>> h5_key("sp|P69905|HBA_HUMAN"), h5_key("a/b")
    ('P69905', 'a%2Fb')
    """
    named = accession(record_id)
    key = named if named and record_id not in ambiguous else record_id
    return _UNNAMEABLE.sub(lambda found: f"%{ord(found[0]):02X}", key)


def _to_float16(array: np.ndarray, record_id: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise LengthwiseError(
            f"record {record_id[:100]!r} has numbers beyond float16's range, the type of the h5 export; remove h5 from "
            "'exports': biotrainer and parquet keep the stored numbers"
        )
    return half
