"""ESM-2's forward pass over packed sequences: all tokens of a batch end to end, no padding, no gradients.

Shapes: T tokens of a batch, N sequences, D width, H heads, C = D / H channels of a head.
The reference is fair-esm 2.0.0, `esm.model.esm2.ESM2` (Lin et al. 2023, doi:10.1126/science.ade2574).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lengthwise.shapes import ModelConfig

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch built without it
    varlen_attn = None

# ESM-2 was trained with 15 % of tokens chosen and 80 % of those masked, and scales every embedding by what is left, at
# inference too. The other factor, 1 / (1 - observed mask ratio), is 1: a mask token never comes from a FASTA file.
TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8
LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Packing:
    """Where each sequence of a batch lies among its tokens."""

    lengths: tuple[int, ...]  # tokens of each sequence, specials included
    bounds: Tensor  # [N + 1] int32: sequence i is tokens bounds[i]:bounds[i + 1]
    positions: Tensor  # [T] int64: 0 for each BOS

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device) -> "Packing":
        lengths = tuple(lengths)
        counts = torch.tensor(lengths)  # [N]
        bounds = F.pad(counts.cumsum(0), (1, 0))  # [N + 1]
        positions = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(counts)  # [T]
        return cls(lengths, bounds.to(device, torch.int32), positions.to(device))

    @property
    def max_length(self) -> int:
        return max(self.lengths)


class ESM2(nn.Module):
    """The packed forward pass; weights come from `lengthwise.checkpoint.load_model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.embed_dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.emb_layer_norm_after = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        # A buffer of the checkpoint, rounded there: computing it afresh moves long sequences visibly.
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2))

    def forward(self, tokens: Tensor, packing: Packing, layers: Iterable[int]) -> dict[int, Tensor]:
        """Hidden representations of the packed tokens.

        Parameters
        ----------
        tokens
            [T] int64, each sequence with its BOS and EOS.
        packing
            Where the sequences lie.
        layers
            Indices 0 (scaled embedding) to num_layers (after the final LayerNorm, as in fair-esm).

        Returns
        -------
        {layer: [T, D]} in the weights' dtype.
        """
        wanted = set(layers)
        hidden = {}
        cos, sin = rotary_tables(self.inv_freq, packing)  # [T, 1, 1, C] each, float32
        x = self.embed_tokens(tokens) * TOKEN_DROPOUT_SCALE  # [T, D]
        if 0 in wanted:
            hidden[0] = x
        for index, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x, cos, sin, packing)  # [T, D]
            if index in wanted:
                hidden[index] = x
        if self.config.num_layers in wanted:
            hidden[self.config.num_layers] = self.emb_layer_norm_after(x)
        return hidden


class Layer(nn.Module):
    """One pre-LayerNorm transformer layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.embed_dim
        self.heads, self.head_dim = config.attention_heads, config.head_dim
        self.self_attn_layer_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(d, 3 * d)
        self.out_proj = nn.Linear(d, d)
        self.final_layer_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packing: Packing) -> Tensor:
        qkv = self.qkv(self.self_attn_layer_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))  # [T, 3, H, C]
        q, k = rotate(qkv[:, :2], cos, sin).unbind(1)  # [T, H, C] each
        attended = attention(q, k, qkv[:, 2], packing)  # [T, H, C]
        x = x + self.out_proj(attended.flatten(1))  # [T, D]
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))  # [T, D]; GELU in its exact, erf form


def rotary_tables(inv_freq: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotation, [T, 1, 1, C], in float32 whatever the compute type."""
    # Half precision would round position 2,049 to 2,048.
    angles = packing.positions.float()[:, None] * inv_freq.float()  # [T, C / 2]
    angles = torch.cat((angles, angles), dim=-1)[:, None, None]  # [T, 1, 1, C]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [T, ., H, C], computed in float32 and returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)  # [T, ., H, C / 2] each
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attention of every token to the tokens of its own sequence: [T, H, C] in, [T, H, C] out."""
    if uses_varlen(q.device, q.dtype):
        length = packing.max_length
        return varlen_attn(q, k, v, packing.bounds, packing.bounds, length, length)
    return _attention_by_runs(q, k, v, packing)


def uses_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length flash kernel serves this device and compute type (sm80 and later, half precision)."""
    return (
        varlen_attn is not None
        and device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _attention_by_runs(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Neighbours of equal length go through one call of scaled_dot_product_attention."""
    out = torch.empty_like(q)
    start = 0
    for length, group in groupby(packing.lengths):
        n = sum(1 for _ in group)
        stop = start + n * length
        run = [part[start:stop].unflatten(0, (n, length)).transpose(1, 2) for part in (q, k, v)]  # [n, H, L, C] each
        attended = F.scaled_dot_product_attention(*run)  # [n, H, L, C]
        out[start:stop] = attended.transpose(1, 2).flatten(0, 1)  # [n * L, H, C]
        start = stop
    return out
