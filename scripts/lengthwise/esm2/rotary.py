"""Rotary position embedding: the angles of every token, and the rotation of queries and keys by them.

fair-esm pairs channel i of a head with channel i + C / 2. Here both channels of a pair lie side by side, as a complex number:
`paired_rows` reorders the weights of q and k alike when a checkpoint is loaded, which leaves the products q k unchanged.
"""

import torch
from torch import Tensor

from lengthwise.esm2.shapes import ModelConfig

ROTARY_BASE = 10_000


def computed_inv_freq(config: ModelConfig) -> Tensor:
    """[C / 2] rotary frequencies in float32, as fair-esm and transformers compute them where no checkpoint has any."""
    return 1.0 / ROTARY_BASE ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)


def rotary_angles(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Cosine and sine of every token's angles, in float32 whatever the compute type.

    Parameters
    ----------
    inv_freq
        [C / 2] float32, as the checkpoint holds them.
    positions
        [T] of each token in its sequence; BOS is 0.

    Returns
    -------
    [T, 1, 1, C / 2, 2]
    """
    angles = positions.float()[:, None] * inv_freq  # [T, C / 2]; half precision would round position 2,049 to 2,048
    return torch.stack((angles.cos(), angles.sin()), -1)[:, None, None]  # [T, 1, 1, C / 2, 2]


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate queries and keys in float32: x [T, 2, H, C] -> [T, 2, H, C] in x's type."""
    pairs = x.unflatten(-1, (-1, 2)).to(torch.float32, copy=True)  # [T, 2, H, C / 2, 2]
    if torch.compiler.is_compiling():  # in real numbers, which torch can compile: (a cos - b sin, b cos + a sin)
        cos, sin = rotary.split(1, -1)  # [T, 1, 1, C / 2, 1] each
        sign = 2 * torch.arange(2, device=x.device) - 1  # -1, 1
        pairs = pairs * cos + pairs.flip(-1) * (sign * sin)  # [T, 2, H, C / 2, 2]
    else:  # in place: new memory would cost more than the product
        torch.view_as_complex(pairs).mul_(torch.view_as_complex(rotary))
    return pairs.flatten(-2).to(x.dtype)  # [T, 2, H, C]


def paired_rows(config: ModelConfig) -> Tensor:
    """[D] rows of a checkpoint's q or k weights, in the order that puts channels i and i + C / 2 side by side."""
    rows = torch.arange(config.embed_dim).view(config.attention_heads, 2, -1)  # [H, 2, C / 2]
    return rows.transpose(1, 2).flatten()  # [D]
