"""The pt export: what fair-esm's extract.py writes."""

import csv
import hashlib
import io
import re
from pathlib import Path

import numpy as np

from lengthwise.export.source import Source

# Ids that a file can have for its name as they are, with room for an ending.
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._|=+@,-]{0,199}")


def write_pt(source: Source, folder: Path, names: list[str]) -> int:
    import torch

    words = {"layer": "representations", "mean": "mean_representations", "bos": "bos_representations"}
    shared = source.shared("lower(id)")
    with open(folder / "files.tsv", "w", newline="") as table:
        rows = csv.writer(table, delimiter="\t", lineterminator="\n")
        rows.writerow(["id", "file"])
        n = 0
        for protein in source.proteins(names):
            n += 1
            result: dict = {"label": protein.id}
            for name, array in protein.stored.items():
                kind, layer = name.split("_")
                result.setdefault(words[kind], {})[int(layer)] = torch.from_numpy(array.astype(np.float32))
            buffer = io.BytesIO()
            torch.save(result, buffer)
            name = file_name(protein.id, shared)
            (folder / name).write_bytes(buffer.getbuffer())
            rows.writerow([protein.id, name])
    return n


def file_name(record_id: str, shared: set[str] = frozenset()) -> str:
    """The name of a record's file in the pt export: its id if that can be one, else what can be kept of it and a checksum.

    >>> file_name("sp|P69905|HBA_HUMAN"), file_name("../a")
    ('sp|P69905|HBA_HUMAN.pt', '_a~61b4c98bfb92bdc9391613020e5b8cbf.pt')
    """
    if _SAFE_NAME.fullmatch(record_id) and record_id not in shared:
        return f"{record_id}.pt"
    kept = re.sub(r"[^A-Za-z0-9._|-]", "_", record_id[:100]).lstrip(".-")
    return f"{kept}~{hashlib.sha256(record_id.encode()).hexdigest()[:32]}.pt"
