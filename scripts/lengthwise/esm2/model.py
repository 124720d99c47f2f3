"""ESM-2's forward pass over packed sequences: all tokens of a batch end to end, no padding, no gradients.

In the order of the data: where sequences lie (`Packing`), the model (`ESM2`), a layer (`Layer`), attention, matrix products
(`Linear`). Rotary embedding: `lengthwise.esm2.rotary`.
Shapes: T tokens of a batch, R residues, N sequences, D width, H heads, C = D / H channels of a head, L longest sequence's tokens.
Types: matrix products and attention in the compute type. The residual stream, LayerNorm, softmax and rotary angles in float32,
so that float16 does not overflow and errors stay smaller.
The reference is fair-esm 2.0.0, `esm.model.esm2.ESM2` (Lin et al. 2023, doi:10.1126/science.ade2574).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import groupby, zip_longest
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lengthwise.esm2.rotary import rotary_angles, rotate
from lengthwise.esm2.shapes import ModelConfig

# ESM-2 was trained with 15 % of tokens chosen and 80 % of those masked. It scales embeddings by the share left, at inference
# too. fair-esm's other factor, 1 / (1 - observed mask ratio), is 1: no FASTA file holds a mask token.
TOKEN_DROPOUT_SCALE = 1 - 0.15 * 0.8
LAYER_NORM_EPS = 1e-5
# Groups of a batch in padded attention: in one, the copies of q, k and v would take more memory than all else.
PADDED_GROUPS = 8
# What is compiled: before the first attention, between two, behind the last.
COMPILED_PARTS = ("project", "finish_and_project", "finish")
# The tokens of a batch for which oneDNN lays out weights; other batches run with the same layout.
PACKED_FOR_TOKENS = 2_048


@dataclass(frozen=True)
class Packing:
    """Where each sequence of a batch lies among its tokens."""

    lengths: tuple[int, ...]  # tokens of each sequence, specials included
    max_length: int  # of these
    bounds: Tensor  # [N + 1] int32: sequence i is tokens bounds[i]:bounds[i + 1]
    positions: Tensor  # [T] int32: 0 for each BOS
    residues: Tensor  # [R] int32: the tokens that are residues

    @classmethod
    def of(cls, lengths: Sequence[int], pin: bool = False) -> "Packing":
        """Pack sequences of these lengths in tokens, on the host; `pin` uses pinned memory, for asynchronous copies to a GPU."""
        # In numpy: a GPU waits for the host where batches are small, and torch takes six times as long.
        counts = np.array(lengths)  # [N]
        bounds = np.append(0, counts.cumsum()).astype(np.int32)  # [N + 1]
        positions = np.arange(bounds[-1], dtype=np.int32) - np.repeat(bounds[:-1], counts)  # [T]
        is_residue = np.ones(len(positions), bool)  # [T]
        is_residue[bounds[:-1]] = is_residue[bounds[1:] - 1] = False
        residues = np.flatnonzero(is_residue).astype(np.int32)  # [R]
        tensors = [torch.from_numpy(array) for array in (bounds, positions, residues)]
        return cls(tuple(lengths), max(lengths), *(tensor.pin_memory() if pin else tensor for tensor in tensors))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bounds, self.positions, self.residues

    def to(self, device: torch.device) -> "Packing":
        on_device = (tensor.to(device, non_blocking=True) for tensor in self.tensors())
        return Packing(self.lengths, self.max_length, *on_device)

    @cached_property
    def groups(self) -> "list[_Group]":
        """The sequences in groups for padded attention."""
        groups, first, start = [], 0, 0
        tokens_per_group = sum(self.lengths) / PADDED_GROUPS
        while first < len(self.lengths):
            last, stop = first + 1, start + self.lengths[first]
            while last < len(self.lengths) and stop + self.lengths[last] - start <= tokens_per_group:
                stop += self.lengths[last]
                last += 1
            groups.append(_Group.of(self.lengths[first:last], self.bounds[first : last + 1], slice(start, stop)))
            first, start = last, stop
        return groups


@dataclass(frozen=True)
class _Group:
    """Neighbouring sequences of a batch that padded attention computes together."""

    shape: tuple[int, int]  # n sequences of length L, padding included
    span: slice  # their t tokens among the batch's
    padded: Tensor | None = None  # [n L] the token of each place, 0 where it is padding; None without padding
    real: Tensor | None = None  # [n, 1, 1, L] which places hold a token
    places: Tensor | None = None  # [t] the place of each token

    @classmethod
    def of(cls, lengths: tuple[int, ...], bounds: Tensor, span: slice) -> "_Group":
        n, length = shape = len(lengths), max(lengths)
        if n * length == span.stop - span.start:
            return cls(shape, span)
        counts, starts = bounds.diff(), bounds[:-1] - bounds[0]  # [n] each
        columns = torch.arange(length, device=bounds.device)  # [L]
        real = columns < counts[:, None]  # [n, L]
        padded = torch.where(real, starts[:, None] + columns, 0)  # [n, L]
        shifts = torch.arange(n, device=bounds.device) * length - starts  # [n] from a token to its place
        places = shifts.repeat_interleave(counts, output_size=span.stop - span.start)  # [t]
        places += torch.arange(len(places), device=bounds.device)
        return cls(shape, span, padded.flatten(), real[:, None, None], places)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The group's tokens [t, H, C] to [t, H, C]."""
        if self.padded is not None:
            q, k, v = (part.index_select(0, self.padded) for part in (q, k, v))  # [n L, H, C] each
        q, k, v = (part.unflatten(0, self.shape).transpose(1, 2) for part in (q, k, v))  # [n, H, L, C] each
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.real).transpose(1, 2).flatten(0, 1)  # [n L, H, C]
        return out if self.places is None else out.index_select(0, self.places)  # [t, H, C]


_OnAttention = Callable[[int, Tensor, Tensor], None]
_Projected = tuple[Tensor, Tensor, Tensor]  # q, k, v: [T, H, C] each


class ESM2(nn.Module):
    """The packed forward pass; weights come from `lengthwise.esm2.checkpoint.load_model`."""

    inv_freq: Tensor  # [C / 2] float32

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compiled_parts: dict[str, Callable] = {}
        # Not nn.Embedding(...): its random initialisation on the meta device imports torch's compiler, which is slow.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocabulary_size, config.embed_dim))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.emb_layer_norm_after = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        # Loaded from the checkpoint, where it is rounded to half: exact values would change long sequences.
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2))

    def forward(
        self, tokens: Tensor, packing: Packing, layers: Iterable[int], on_attention: "_OnAttention | None" = None
    ) -> dict[int, Tensor]:
        """Compute the hidden representations of the packed tokens.

        Parameters
        ----------
        tokens
            [T] integers; each sequence begins with BOS and ends with EOS.
        packing
            Where the sequences lie among the tokens.
        layers
            Indices 0 (scaled embedding) to num_layers (after the final LayerNorm, as in fair-esm).
        on_attention
            Called before each attention with the layer's number, from 0, and its rotated queries and keys [T, H, C].

        Returns
        -------
        {layer: [T, D]} in float32, whatever the compute type.
        """
        wanted = set(layers)
        hidden = {}
        x, rotary = self.begin(tokens, packing)
        if 0 in wanted:
            hidden[0] = x
        stack = [cast(Layer, layer) for layer in self.layers][: max(wanted)]  # slicing the ModuleList would copy it
        run = self._run
        projected: list[_Projected] = [
            run("project", layer, x, rotary) for layer in stack[:1]
        ]  # the next q, k and v: [T, H, C] each
        for index, (layer, following) in enumerate(zip_longest(stack, stack[1:]), start=1):
            if on_attention:
                on_attention(index - 1, *projected[0][:2])
            attended = attention(*projected.pop(), packing)  # [T, H, C]; the memory of q, k and v is free from here on
            if following and self.compiled:
                x, *projected = run("finish_and_project", layer, x, attended, following, rotary)  # [T, D]
            else:
                x = run("finish", layer, x, attended)  # [T, D]
                projected = [run("project", following, x, rotary)] if following else []
            if index in wanted:
                hidden[index] = self.representation(index, x)
        return hidden

    def begin(self, tokens: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """What goes into the first layer: the scaled embedding [T, D] in float32, and the angles [T, 1, 1, C / 2, 2]."""
        return self.embed_tokens(tokens.int()) * TOKEN_DROPOUT_SCALE, rotary_angles(self.inv_freq, packing.positions)

    def advance(
        self, layer: "Layer", x: Tensor, rotary: Tensor, packing: Packing, on_attention: Callable | None = None
    ) -> Tensor:
        """The residual sums before a layer, of this model or of its shape, to those behind it: [T, D] to [T, D].

        `on_attention` is called before attention with the rotated queries and keys [T, H, C].
        """
        projected: _Projected = self._run("project", layer, x, rotary)
        if on_attention:
            on_attention(*projected[:2])
        return self._run("finish", layer, x, attention(*projected, packing))

    def _run(self, part: str, layer: "Layer", *arguments: Any) -> Any:
        """A part of a layer, compiled if there is code for it. Bound to the layer, that code would keep it in memory."""
        compiled = self.compiled_parts.get(part)
        return compiled(layer, *arguments) if compiled else getattr(layer, part)(*arguments)

    def representation(self, index: int, x: Tensor) -> Tensor:
        """The hidden representation behind a layer (counted from 1), from the residual sums: [T, D] to [T, D]."""
        return self.emb_layer_norm_after(x) if index == self.config.num_layers else x

    def compile(self) -> None:
        """Let torch compile everything but attention, once for all layers, in the next pass.

        That pass raises torch's errors if torch finds no compiler. Its size should be the usual one: inductor chooses launch
        configurations for it.
        """
        import torch._dynamo  # here: it is slow

        # torch counts recompilations per function, for all models of a process, and beyond eight runs uncompiled in silence.
        torch._dynamo.reset()
        config = torch._dynamo.config
        renamed = hasattr(config, "fail_on_recompile_limit_hit")  # in torch 2.7
        setattr(config, "fail_on_recompile_limit_hit" if renamed else "fail_on_cache_limit_hit", True)
        self.compiled_parts = {name: torch.compile(getattr(Layer, name), dynamic=True) for name in COMPILED_PARTS}

    def uncompile(self) -> None:
        """Undo `compile`."""
        self.compiled_parts = {}

    @property
    def compiled(self) -> bool:
        """Whether torch has compiled the layers."""
        return bool(self.compiled_parts)


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

    def project(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values: [T, H, C] each, in the compute type."""
        qkv = self.qkv(self.self_attn_layer_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))  # [T, 3, H, C]
        return *rotate(qkv[:, :2], rotary).unbind(1), qkv[:, 2]  # [T, H, C] each

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The output projection, the feed-forward part and both residual sums: x [T, D] and attended [T, H, C] -> [T, D]."""
        x = self.out_proj.add_to(x, attended.flatten(1))  # [T, D]
        return self.fc2.add_to(x, self.fc1.gelu(self.final_layer_norm(x)))  # [T, D]

    def finish_and_project(
        self, x: Tensor, attended: Tensor, following: "Layer", rotary: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """`finish`, and the following layer's `project`: compiled as one, they read the sums once."""
        x = self.finish(x, attended)  # [T, D]
        return x, following.project(x, rotary)  # [T, D], [T, H, C] each


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attention of every token to the tokens of its own sequence: [T, H, C] in, [T, H, C] out."""
    if uses_varlen(q.device, q.dtype):
        from torch.nn.attention.varlen import varlen_attn  # here: it imports torch's compiler, which is slow

        length = packing.max_length
        return cast(Tensor, varlen_attn(q, k, v, packing.bounds, packing.bounds, length, length))
    if q.device.type == "cpu":
        return _attention_by_length(q, k, v, packing)
    return _attention_padded(q, k, v, packing)


def uses_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has the variable-length flash kernel for a device and compute type: sm80 or later, half precision."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
        and has_varlen()
    )


@cache
def has_varlen() -> bool:
    """Whether this torch has `varlen_attn`: from 2.10 on. (Looked up, not imported: that would import torch's compiler.)"""
    return find_spec("torch.nn.attention.varlen") is not None


def _attention_padded(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """A padded call for each of a few groups: for GPUs without the varlen kernel, where a call per length would cost more.

    Padding is small: a group's lengths differ little where a batch's are sorted. It takes less memory than the feed-forward part.
    """
    return torch.cat([each.attention(q[each.span], k[each.span], v[each.span]) for each in packing.groups])  # [T, H, C]


def _attention_by_length(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One call for each run of sequences of equal length: for CPUs, where a call is cheap and padding expensive."""
    out = torch.empty_like(q)
    # Heads of 16 channels are faster in float32 than in bfloat16.
    dtype = q.dtype if q.shape[-1] >= 32 else torch.float32
    start = 0
    for length, group in groupby(packing.lengths):
        n = sum(1 for _ in group)
        stop = start + n * length
        run = (part[start:stop].to(dtype).unflatten(0, (n, length)).transpose(1, 2) for part in (q, k, v))
        q_run, k_run, v_run = run  # [n, H, length, C] each
        attended = F.scaled_dot_product_attention(q_run, k_run, v_run).transpose(1, 2)  # [n, length, H, C]
        out[start:stop] = attended.flatten(0, 1)  # [n * length, H, C]
        start = stop
    return out


class Linear(nn.Linear):
    """A linear layer fused with the operation that follows it; on CPUs through oneDNN, with weights packed once.

    The fused operators are those that torch's inductor calls in compiled CPU code. Calls name their overload: torch's own
    overload search formats every tensor for an error message, which is slow.
    """

    packed: Tensor | None = None

    def pack(self) -> None:
        """Replace the weights by oneDNN's packed layout, if this CPU and this torch have it for the compute type."""
        if self.weight.device.type == "cpu" and onednn_serves(self.weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACKED_FOR_TOKENS)
            self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] of any type -> [T, out] in the compute type."""
        x = x.to(self.bias.dtype)
        if self.packed is None:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """The layer's output after the exact (erf) GELU: x [T, in] -> [T, out]."""
        if self.packed is None:
            out = self(x)  # [T, out]
            # In place, but for gradients: it is a layer's largest tensor.
            return F.gelu(out) if out.requires_grad else torch.ops.aten.gelu_.default(out)
        x = x.to(self.bias.dtype)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "gelu", [], "none")

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [T, out] + the layer's output, in float32: [T, out]."""
        if self.packed is None or x.dtype != residual.dtype:
            return residual + self(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")


def emulated_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU computes a type through another one, slower than float32, as far as torch knows."""
    return dtype != torch.float32 and not onednn_serves(dtype)


def onednn_serves(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes a type with instructions of this CPU, rather than emulating it. Torch for macOS has no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
