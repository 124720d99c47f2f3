"""The pt export: a torch file for each protein, as fair-esm's extract.py writes them."""

import csv
import hashlib
import io
import re
from collections.abc import Set
from pathlib import Path

import numpy as np
from crc32c import crc32c

from lengthwise.esm2.tensors import unpacked
from lengthwise.export.source import Source

# Ids that can be file names unchanged, with room for an ending.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._|=+@,-]{0,199}")


def write_pt(source: Source, folder: Path, names: list[str]) -> int:
    """Write a file for each protein and `files.tsv` into `folder`. Returns the number of proteins."""
    import torch

    keys = {"layer": "representations", "mean": "mean_representations", "bos": "bos_representations"}
    ambiguous = source.ids_sharing("lower(id)")
    with open(folder / "files.tsv", "w", newline="") as table:
        rows = csv.writer(table, delimiter="\t", lineterminator="\n")
        rows.writerow(["id", "file", "bytes", "crc32c"])
        n = 0
        for protein in source.proteins(names):
            n += 1
            result: dict = {"label": protein.id}
            for name, array in protein.stored.items():
                if name == "contacts":
                    if len(array):
                        result["contacts"] = torch.from_numpy(unpacked(array))
                    continue
                kind, layer = name.split("_")
                result.setdefault(keys[kind], {})[int(layer)] = torch.from_numpy(array.astype(np.float32))
            buffer = io.BytesIO()
            torch.save(result, buffer)
            name = file_name(protein.id, ambiguous)
            content = buffer.getvalue()
            (folder / name).write_bytes(content)
            rows.writerow([protein.id, name, len(content), f"{crc32c(content):08x}"])
    return n


def file_name(record_id: str, ambiguous: Set[str] = frozenset()) -> str:
    """The name of a record's file in the pt export: its id.

    An id that cannot be a file name, or one of `ambiguous` (ids that differ in case alone), becomes its safe characters and a
    checksum.

    >>> file_name("sp|P69905|HBA_HUMAN"), file_name("../a")
    ('sp|P69905|HBA_HUMAN.pt', '_a~61b4c98bfb92bdc9391613020e5b8cbf.pt')
    """
    if _SAFE_NAME.fullmatch(record_id) and record_id not in ambiguous:
        return f"{record_id}.pt"
    safe = re.sub(r"[^A-Za-z0-9._|-]", "_", record_id[:100]).lstrip(".-")
    return f"{safe}~{hashlib.sha256(record_id.encode()).hexdigest()[:32]}.pt"
