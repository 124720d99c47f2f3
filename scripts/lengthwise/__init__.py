"""Lengthwise: batch protein embedding with ESM-2.

>>> import lengthwise
>>> ds = lengthwise.open("results/demo/datasets/example")
>>> ds["sp|P02135|HBB_LITCT"].shape
(140, 320)
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError

if TYPE_CHECKING:
    from lengthwise.read.dataset import Dataset

__all__ = ["LengthwiseError", "__version__", "open"]


def open(path: str | Path) -> "Dataset":
    """Open a finished dataset, results/<model>/datasets/<dataset>, for reading: see `lengthwise.read.dataset.Dataset`."""
    from lengthwise.read.dataset import Dataset  # imported here to keep numpy out of the Snakefile

    return Dataset(path)
