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
# Longest sequence whose attention scores a CPU writes out in bfloat16, and how many of them at once.
EXPLICIT_TOKENS = 1_024
SCORES_IN_CACHE = 1_024 * 1_024
# The batch that oneDNN packs weights for; others run with the same weights.
PACKED_FOR_TOKENS = 2_048


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
        turn = rotations(self.inv_freq, packing)  # [T, 1, 1, C / 2] complex64
        x = self.embed_tokens(tokens) * TOKEN_DROPOUT_SCALE  # [T, D]
        if 0 in wanted:
            hidden[0] = x
        for index, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x, turn, packing)  # [T, D]
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
        self.qkv = Linear(d, 3 * d)
        self.out_proj = Linear(d, d)
        self.final_layer_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.fc1 = Linear(d, 4 * d)
        self.fc2 = Linear(4 * d, d)

    def forward(self, x: Tensor, turn: Tensor, packing: Packing) -> Tensor:
        qkv = self.qkv(self.self_attn_layer_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))  # [T, 3, H, C]
        q, k = rotate(qkv[:, :2], turn).unbind(1)  # [T, H, C] each
        attended = attention(q, k, qkv[:, 2], packing)  # [T, H, C]
        x = self.out_proj.add_to(x, attended.flatten(1))  # [T, D]
        return self.fc2.add_to(x, self.fc1.gelu(self.final_layer_norm(x)))  # [T, D]


class Linear(nn.Linear):
    """A linear layer with what follows it; on CPUs through oneDNN, its weights packed once and the rest fused in.

    Source of the fused operators: torch's own inductor, which calls them in compiled CPU code. Their overloads are named:
    left to torch, it would try each in turn, and write out every tensor for an error message that nobody reads.
    """

    packed: Tensor | None = None

    def pack(self) -> None:
        """Trade the weights for oneDNN's form of them, where this CPU and this torch have it for the compute type."""
        if self.weight.device.type == "cpu" and onednn_serves(self.weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACKED_FOR_TOKENS)
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if self.packed is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its exact, erf form of the layer's output."""
        if self.packed is None:
            return F.gelu(super().forward(x))
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "gelu", [], "none")

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the layer's output."""
        if self.packed is None:
            return residual + super().forward(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")


def onednn_serves(dtype: torch.dtype) -> bool:
    """Whether this CPU computes a type with instructions of its own, through oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    # bfloat16 and float16 where the processor has instructions for them; elsewhere oneDNN would emulate them.
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rotations(inv_freq: Tensor, packing: Packing) -> Tensor:
    """Every token's rotation as complex numbers e^(i angle), [T, 1, 1, C / 2], in float32 whatever the compute type."""
    # Half precision would round position 2,049 to 2,048.
    angles = packing.positions.float()[:, None] * inv_freq.float()  # [T, C / 2]
    return torch.polar(torch.ones_like(angles), angles)[:, None, None]  # [T, 1, 1, C / 2]


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding of x [T, ., H, C], computed in float32 and returned in x's dtype.

    fair-esm pairs channel i with channel i + C / 2. `lengthwise.checkpoint` has moved each pair's weights next to each
    other, in queries and keys alike, which leaves their products as they were; so a pair is one complex number here.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [T, ., H, C / 2]
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)  # [T, ., H, C]


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
    """Neighbours of equal length go through one call."""
    attend = F.scaled_dot_product_attention
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and packing.max_length <= EXPLICIT_TOKENS:
        attend = _explicit_attention
    out = torch.empty_like(q)
    start = 0
    for length, group in groupby(packing.lengths):
        n = sum(1 for _ in group)
        stop = start + n * length
        run = [part[start:stop].unflatten(0, (n, length)).transpose(1, 2) for part in (q, k, v)]  # [n, H, L, C] each
        out[start:stop] = attend(*run).transpose(1, 2).flatten(0, 1)  # [n * L, H, C]
        start = stop
    return out


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of [n, H, L, C], a few heads at a time so that their scores stay in the cache.

    On CPUs torch's fused kernel computes bfloat16 by way of float32; these products use the bfloat16 instructions.
    """
    n, heads, length, channels = q.shape
    q, k, v = ((q * channels**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # [n * H, L, C] each
    out = torch.empty_like(q)
    step = max(1, SCORES_IN_CACHE // length**2)
    for i in range(0, n * heads, step):
        scores = torch.bmm(q[i : i + step], k[i : i + step].transpose(1, 2))  # [step, L, L]
        weights = scores.float().softmax(-1).to(v.dtype)
        torch.bmm(weights, v[i : i + step], out=out[i : i + step])
    return out.unflatten(0, (n, heads))  # [n, H, L, C]
