"""The biotrainer export: embeddings by the hash of a sequence."""

import itertools
from pathlib import Path

from lengthwise.export.hdf5 import HDF5File
from lengthwise.export.source import Source
from lengthwise.store.paths import store_name


def write_biotrainer(source: Source, folder: Path, names: list[str]) -> int:
    model = store_name(source.settings["model"])
    about = {**source.origin, "layer": source.layer}
    n = 0
    with (
        HDF5File(folder / f"embeddings_file_{model}.h5", about) as residues,
        HDF5File(folder / f"reduced_embeddings_file_{model}.h5", about) as means,
    ):
        for key, same in itertools.groupby(source.proteins(names, with_key=True), key=lambda protein: protein.key):
            # biotrainer looks a sequence up by its key; other ids of it are beside it, for those who look for ids.
            for number, protein in enumerate(same, start=1):
                n += 1
                for name, file in zip(names, (residues, means), strict=True):
                    file.create(key if number == 1 else f"{key}_{number}", protein.stored[name], protein.id)
    return n
