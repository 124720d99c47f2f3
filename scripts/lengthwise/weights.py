"""Weights: make sure that the configured model's checkpoint is on this machine, and record what it is."""

import os
from pathlib import Path

from lengthwise.config import DEMO, MODEL_NAMES
from lengthwise.errors import LengthwiseError
from lengthwise.files import atomic, sha256


def path_of(model: str, folder: str) -> Path:
    """Where a model's checkpoint is, or will be."""
    return Path(model) if model.endswith(".pt") else Path(folder) / f"{model}.pt"


def fetch(model: str, folder: str) -> dict:
    """Have a model's checkpoint at hand.

    Parameters
    ----------
    model
        An ESM-2 name, the path of a fair-esm ``.pt``, or ``demo``, which is made on the spot.
    folder
        Where weights are kept.

    Returns
    -------
    The receipt: path, bytes, mtime_ns, sha256, the model's shape and whether its weights are random.

    Raises
    ------
    LengthwiseError
        The checkpoint is not there and cannot be made, or is not ESM-2.
    """
    from lengthwise import checkpoint

    path = path_of(model, folder)
    if model == DEMO and not path.exists():
        with atomic(path) as part:
            checkpoint.write_random(part, checkpoint.DEMO_SHAPE)
    elif model in MODEL_NAMES and not path.exists():
        raise LengthwiseError(
            f"{path} is not there: download https://dl.fbaipublicfiles.com/fair-esm/models/{model}.pt and put it there"
        )
    shape, _, random = checkpoint.read(path)
    stat = os.stat(path)
    return {
        "model": model,
        "path": str(path),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": sha256(path),
        "num_layers": shape.num_layers,
        "embed_dim": shape.embed_dim,
        "attention_heads": shape.attention_heads,
        "random_weights": random,
    }
