"""`windows.arrow` of a dataset: where the rows of its proteins in windows are, and their pooled vectors.

It has a row for each such protein, by `digest` (of the whole sequence): `length`, `pieces` (first to last), and a column for each
pooled output and layer, `mean_<n>` [D] float32. It is an Arrow IPC file, to be memory-mapped. Other datasets have none.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.tensors import OF_ROWS, over_rows, split
from lengthwise.store.shard import Shard

WINDOWS = "windows.arrow"
_PIECE = pa.struct(
    [
        ("first", pa.int32()),  # residues first to stop of the protein are rows of this window
        ("stop", pa.int32()),
        ("start", pa.int32()),  # the protein's residue with which the window begins
        ("residues", pa.int32()),  # of the window
        ("digest", pa.binary(24)),  # of the window
        ("shard", pa.string()),
        ("sequence_no", pa.int32()),
        ("row_start", pa.int64()),
    ]
)
_FLAT = pa.schema(
    [
        ("protein", pa.binary(24)),
        ("shard", pa.string()),
        ("sequence_no", pa.int32()),
        ("row_start", pa.int64()),
        ("length", pa.int32()),
        ("digest", pa.binary(24)),
    ]
)
# Pooled vectors that are written at a time.
_BATCH_BYTES = 16 << 20
Piece = dict


def write_windows(
    path: Path, proteins: Iterable[tuple[bytes, int, list[Piece]]], settings: dict, open_shard: Callable[[str], Shard]
) -> set[str]:
    """Write the file; returns the names of the shards that hold the windows.

    Parameters
    ----------
    path
        The file to write.
    proteins
        (digest, length, pieces) of each protein, in the order of digests.
    settings
        The store's settings: layers, outputs and width.
    open_shard
        Opens a shard by its name.

    Raises
    ------
    LengthwiseError
        A shard does not hold what a piece says.
    """
    layers, width = settings["layers"], settings["embed_dim"]
    kinds = [output for output in settings["outputs"] if output in OF_ROWS]
    fields = [("digest", pa.binary(24)), ("length", pa.int32()), ("pieces", pa.list_(_PIECE))]
    vectors = [(f"{kind}_{layer}", pa.list_(pa.float32(), width)) for layer in layers for kind in kinds]
    schema = pa.schema([*fields, *vectors])
    shards: set[str] = set()
    with pa.ipc.new_file(path, schema) as file:
        for group in _in_groups(proteins, max(1, _BATCH_BYTES // (4 * width * max(len(vectors), 1)))):
            columns = dict(zip(("digest", "length", "pieces"), map(list, zip(*group, strict=True)), strict=True))
            columns |= {name: [] for name, _ in vectors}
            for *_, pieces in group:
                for layer in layers if kinds else ():
                    rows = joined_rows(f"layer_{layer}", pieces, open_shard)
                    for kind in kinds:
                        columns[f"{kind}_{layer}"].append(over_rows(rows, kind))
            shards.update(piece["shard"] for pieces in columns["pieces"] for piece in pieces)
            file.write_batch(pa.record_batch(columns, schema=schema))
    return shards


def joined_rows(name: str, pieces: list[Piece], open_shard: Callable[[str], Shard]) -> np.ndarray:
    """The rows of a protein, [L, D], copied together from its windows.

    Raises
    ------
    LengthwiseError
        A shard is missing or damaged, or does not hold what a piece says.
    """
    parts = []
    for piece in pieces:
        shard, row_start = open_shard(piece["shard"]), piece["row_start"]
        if not shard.holds(piece["sequence_no"], piece["digest"], row_start, piece["residues"]):
            raise LengthwiseError(f"{shard.path}: does not hold the window that {WINDOWS} says")
        first, stop = (row_start + piece[side] - piece["start"] for side in ("first", "stop"))
        parts.append(shard.rows(name, first, stop))
    return np.concatenate(parts)


class Windows:
    """The proteins in windows of a dataset.

    Parameters
    ----------
    folder
        The dataset's folder; without `windows.arrow` there are none.

    Raises
    ------
    LengthwiseError
        The file is damaged.
    """

    def __init__(self, folder: Path):
        self.path = folder / WINDOWS
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
            self.table.validate()
            digests = b"".join(self.table["digest"].to_pylist())
        except FileNotFoundError:
            self.table, digests = None, b""
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise self.damaged() from error
        self._digests = np.frombuffer(digests, np.uint8).reshape(-1, 24)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """[n, 24] uint8 -> the row of each, -1 where it is no protein in windows: [n] int64."""
        if not len(self):
            return np.full(len(digests), -1)
        known, asked = (np.ascontiguousarray(part).view("S24").ravel() for part in (self._digests, digests))
        rows = np.minimum(known.searchsorted(asked), len(self) - 1)
        return np.where(known[rows] == asked, rows, -1)

    def row(self, digest: np.ndarray) -> int | None:
        """The row of the protein with this digest [24] uint8; None if it is no protein in windows."""
        row = int(self.find(digest[None])[0])
        return None if row < 0 else row

    def rows(self, row: int, name: str, open_shard: Callable[[str], Shard]) -> np.ndarray:
        """A protein's rows [L, D] of a tensor, see `joined_rows`."""
        return joined_rows(name, self.pieces(row), open_shard)

    def pieces(self, row: int) -> list[Piece]:
        """The pieces of a protein, first to last."""
        return self.table["pieces"][row].as_py()

    def pooled(self, name: str, rows: np.ndarray, open_shard: Callable[[str], Shard]) -> np.ndarray:
        """Pooled vectors [n, D] float32 of the proteins of these rows [n]: stored ones, or computed from joined rows."""
        if name in self.table.column_names:
            vectors = self.table[name].take(pa.array(rows)).combine_chunks()
            return vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
        kind, layer = split(name)
        return np.stack([over_rows(self.rows(row, f"layer_{layer}", open_shard), kind) for row in rows.tolist()])

    def flat(self) -> pa.Table:
        """A row for each piece: the digest of the `protein`; of the window its place in a shard, its `length` and `digest`."""
        if self.table is None:
            return _FLAT.empty_table()
        pieces = self.table["pieces"].combine_chunks()
        parts, proteins = pieces.flatten(), self.table["digest"].combine_chunks().take(pc.list_parent_indices(pieces))
        fields = [parts.field(name) for name in ("shard", "sequence_no", "row_start", "residues", "digest")]
        return pa.table([proteins, *fields], schema=_FLAT)

    def damaged(self) -> LengthwiseError:
        return LengthwiseError(f"{self.path}: damaged; remove it and run snakemake again")


def _in_groups(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
