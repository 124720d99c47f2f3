"""Opening the shards of a dataset, and refusing a shard that does not match the dataset's index."""

import errno
from pathlib import Path
from typing import Any

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.store.layout import REMAKE, is_laid_out
from lengthwise.store.paths import shard_path
from lengthwise.store.shard import Shard


def open_shard(dataset: Path, store: Path, settings: dict[str, Any], name: str) -> Shard:
    """Open a shard and check that its settings and tensors are those of the dataset.

    Parameters
    ----------
    dataset
        The dataset's folder, for errors.
    store, settings
        The store's folder, and the settings in the dataset's manifest.
    name
        The shard's name.

    Raises
    ------
    LengthwiseError
        The shard is missing, damaged, or of other settings.
    """
    try:
        shard = Shard(shard_path(store, name))
    except LengthwiseError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        advice = "too many arrays of different shards are held; keep copies instead, np.array(ds[...])"
        raise LengthwiseError(f"{error}: {advice}") from error
    same_settings = shard.metadata.get("fingerprint") == settings["fingerprint"]
    if not same_settings or not is_laid_out(shard.tensors, np.diff(shard["offsets"]), settings):
        raise mismatch(dataset, shard)
    return shard


def mismatch(dataset: Path, shard: Shard) -> LengthwiseError:
    """The error of a shard that does not hold what the dataset's index says."""
    return LengthwiseError(
        f"{shard.path}: does not hold what the index of {dataset} says; if python -m lengthwise verify finds no damage in "
        f"the index, {REMAKE}"
    )
