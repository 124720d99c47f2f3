"""Lengthwise: batch protein embedding with ESM-2.

>>> import lengthwise
>>> ds = lengthwise.open("results/demo/datasets/example")
>>> ds["sp|P02135|HBB_LITCT"].shape
(140, 320)
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError

if TYPE_CHECKING:
    from lengthwise.read.embeddings import Embeddings
    from lengthwise.read.joined import Joined

__all__ = ["LengthwiseError", "__version__", "concat", "open"]


# Annotated with Any: a path alone tells whether it is a Dataset or a Store, and a union would have every use checked.
def open(path: str | Path) -> Any:
    """Open a finished dataset, or a store, for reading.

    Parameters
    ----------
    path
        ``results/<model>/datasets/<dataset>`` opens a dataset, see `lengthwise.read.dataset.Dataset`. ``results/<model>`` opens
        the store, see `lengthwise.read.store.Store`: all finished datasets by name.

    Raises
    ------
    LengthwiseError
        There is no such folder, nothing in it is finished, or it is damaged.
    """
    from lengthwise.read.completeness import is_store  # imported here to keep numpy out of the Snakefile
    from lengthwise.read.dataset import Dataset
    from lengthwise.read.store import Store

    return Store(path) if is_store(Path(path)) else Dataset(path)


def concat(datasets: "Iterable[Embeddings]") -> "Joined":
    """Join datasets, or selections of them, one after the other: see `lengthwise.read.joined.Joined`.

    Raises
    ------
    LengthwiseError
        Their numbers are not comparable, they read different layers, or one id names two different sequences.

    Examples
    --------
    >>> ds = lengthwise.open("results/demo/datasets/example")
    >>> both = lengthwise.concat([ds[:2], ds[70:]])
    >>> len(both), both.pooled().shape
    (11, (11, 320))
    """
    from lengthwise.read.joined import Joined

    return Joined.of(datasets)
