"""The biotrainer export: an HDF5 file in which the key of an embedding is a hash of its sequence."""

import itertools
from pathlib import Path

from lengthwise.export.hdf5 import HDF5File
from lengthwise.export.source import Source
from lengthwise.store.paths import store_name


def write_biotrainer(source: Source, folder: Path, names: list[str]) -> int:
    """Write the files of rows and of means into `folder`. Returns the number of entries."""
    model = store_name(source.settings["model"])
    about = {**source.origin, "layer": source.layer}
    n = 0
    with (
        HDF5File(folder / f"embeddings_file_{model}.h5", about) as residues,
        HDF5File(folder / f"reduced_embeddings_file_{model}.h5", about) as means,
    ):
        for key, proteins in itertools.groupby(source.proteins(names, with_key=True), key=lambda protein: protein.key):
            # biotrainer reads `key`. The sequence's other ids get keys of their own, so that every id can be found.
            for number, protein in enumerate(proteins, start=1):
                n += 1
                for name, file in zip(names, (residues, means), strict=True):
                    file.create(key if number == 1 else f"{key}_{number}", protein.stored[name], protein.id)
    return n
