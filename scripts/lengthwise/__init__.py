"""Lengthwise: batch protein embedding with ESM-2.

>>> import lengthwise
>>> ds = lengthwise.open("results/demo/datasets/example")  # doctest: +SKIP
>>> ds["sp|P69905|HBA_HUMAN"].shape  # doctest: +SKIP
(142, 320)
"""

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError

__all__ = ["LengthwiseError", "__version__", "open"]


def open(path):
    """Open a finished dataset for reading: see `lengthwise.reading.Dataset`."""
    from lengthwise.reading import Dataset  # here, so that the Snakefile imports the package without pandas

    return Dataset(path)
