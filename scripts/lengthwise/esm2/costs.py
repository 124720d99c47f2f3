"""Bytes of a batch's results, and assumed seconds per sequence. Needs no torch."""

from collections.abc import Collection

import numpy as np

from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.tokens import VOCABULARY_SIZE

# Floating-point operations per second before any measurement: two cores of a 2023 server in float32; a third of an A100's
# dense float16 peak (https://www.nvidia.com/en-us/data-center/a100/).
ASSUMED_FLOPS = {"cpu": 60e9, "cuda": 100e12}


def forecast_seconds(lengths: np.ndarray, shape: ModelConfig, device: str) -> np.ndarray:
    """Seconds that each sequence takes on a device at the assumed speed.

    Parameters
    ----------
    lengths
        [N] residues of each sequence.
    shape
        The model's shape.
    device
        cpu or cuda.
    """
    return shape.flops(lengths.astype(np.float64)) / ASSUMED_FLOPS[device]


def result_bytes_per_token(
    embed_dim: int, num_layers: int, outputs: Collection[str], storage_itemsize: int, contacts_max_residues: int = 0
) -> int:
    """Device memory of a batch's results for each of its tokens: the `stored_bytes` of `ModelConfig.bytes_per_token`.

    Parameters
    ----------
    embed_dim
        The model's width.
    num_layers
        How many layers are stored.
    outputs
        Of `lengthwise.esm2.tensors.OUTPUTS`; only what there is of each residue takes memory that counts.
    storage_itemsize
        Bytes of a stored number.
    contacts_max_residues
        Of sequences that have contacts; those of the longest are counted.
    """
    stored = num_layers * embed_dim * storage_itemsize if "residue" in outputs else 0
    if "logits" in outputs:
        stored += VOCABULARY_SIZE * storage_itemsize
    if "contacts" in outputs:
        stored += contacts_max_residues + 1  # float16, of half of a map
        stored += 4 * (contacts_max_residues + 2)  # the sums, in float32
    # Float32 representations of layers that are not pooled yet; logits are of the last layer, stored or not.
    waiting = 4 * (num_layers - ("logits" not in outputs)) * embed_dim
    return stored + waiting
