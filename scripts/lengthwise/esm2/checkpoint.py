"""Checkpoints: opened in fair-esm's layout or in transformers', loaded into a model, or written with random weights."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import fair_esm_layout, hugging_face_layout
from lengthwise.esm2.model import ESM2, Layer, Linear
from lengthwise.esm2.rotary import computed_inv_freq, paired_rows
from lengthwise.esm2.shapes import MODELS, ModelConfig
from lengthwise.esm2.sources import require_feed_forward

DEMO_SHAPE = MODELS["esm2_t6_8M_UR50D"]


class Checkpoint(NamedTuple):
    """An open checkpoint: its tensors are mapped to the files, and read where they are used."""

    shape: ModelConfig
    state: dict[str, torch.Tensor]  # under fair-esm's names without their ``encoder.`` prefixes
    random: bool  # whether `write_random` wrote it
    has_frequencies: bool  # whether its rotary frequencies are the files' own, or else computed in float32


def read(path: Path) -> Checkpoint:
    """Open an ESM-2 checkpoint, memory-mapped. Code in a pickle is refused and never runs.

    Parameters
    ----------
    path
        A fair-esm ``.pt``; or, as transformers writes them, a folder or a safetensors file with its config.json beside it.

    Raises
    ------
    LengthwiseError
        The files cannot be read, or are not an ESM-2 checkpoint.
    """
    path = Path(path)
    if not path.exists() or (path.suffix == ".pt" and not path.is_file()):
        raise LengthwiseError(f"{path}: no such checkpoint; 'model' takes a model's name, an id of the hub, or a path")
    if path.is_dir() or path.suffix == ".safetensors":
        config, state, has_frequencies, theirs = hugging_face_layout.read(path)
        random = False
    else:
        config, state, random = fair_esm_layout.read(path)
        has_frequencies, theirs = True, {}
    _require_feed_forward(path, state, config.embed_dim)
    _require(path, state, _required_shapes(config), theirs)
    return Checkpoint(config, state, random, has_frequencies)


def _require_feed_forward(path: Path, state: dict[str, torch.Tensor], embed_dim: int) -> None:
    """Refuse a model of another feed-forward width, where the first layer's tensors agree on one."""
    into, out = (getattr(state.get(f"layers.0.{name}.weight"), "shape", None) for name in ("fc1", "fc2"))
    if into and out and len(into) == 2 and into[::-1] == out and into[1] == embed_dim:
        require_feed_forward(path, into[0], embed_dim)


def _require(
    path: Path, state: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]], theirs: dict[str, str]
) -> None:
    """Refuse a state without tensors of these shapes; `theirs` has the names by which the user knows them."""
    if missing := sorted(theirs.get(name, name) for name in expected.keys() - state.keys()):
        raise LengthwiseError(f"{path}: the checkpoint lacks {len(missing)} tensors, {missing[0]} the first of them")
    for name, shape in expected.items():
        found = getattr(state[name], "shape", None)
        if found != shape:
            raise LengthwiseError(
                f"{path}: the tensor {theirs.get(name, name)} is {found and tuple(found)} and should be {shape}"
            )
        if state[name].dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise LengthwiseError(
                f"{path}: the tensor {theirs.get(name, name)} is {state[name].dtype}; quantised weights are not served"
            )


def require_finite(path: Path) -> None:
    """Raise LengthwiseError if a weight of the encoder is NaN or infinite. This reads the whole checkpoint."""
    config, state, *_ = read(path)
    _require_finite(path, state, _required_shapes(config))


def require_finite_head(path: Path, head: str) -> None:
    """Raise LengthwiseError if a weight of a head, as of `load_head`, is NaN or infinite."""
    path = Path(path)
    in_own_file = head == "contact_head" and path.suffix == ".pt"
    file = fair_esm_layout.contact_regression_path(path) if in_own_file else path
    weights = load_head(path, head, torch.device("cpu"))
    named = {f"{head}.{name}": tensor for name, tensor in weights.items()}
    _require_finite(file, named, named)


def _require_finite(path: Path, state: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    for name in names:
        if not state[name].isfinite().all():
            raise LengthwiseError(f"{path}: the tensor {name} has values that are NaN or infinite; the file is damaged")


def load_head(path: Path, head: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Load the weights of a head, in float32 under fair-esm's names without the head's own.

    Parameters
    ----------
    path
        A checkpoint, as of `read`. A fair-esm ``.pt`` has its contact head's weights in the file
        ``<stem>-contact-regression.pt`` beside it.
    head
        ``lm_head`` or ``contact_head``.
    device
        Where the weights go.

    Raises
    ------
    LengthwiseError
        The checkpoint does not have the head.
    """
    path = Path(path)
    config, state, *_ = read(path)
    if head == "contact_head" and path.suffix == ".pt":
        state = state | fair_esm_layout.read_contact_regression(path)
    shapes = {f"{head}.{name}": shape for name, shape in _head_shapes(config)[head].items()}
    _require(path, state, shapes, {})
    return {name.removeprefix(f"{head}."): _copy_of(state[name], device) for name in shapes}


def _head_shapes(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    d = config.embed_dim
    return {
        "lm_head": {
            "dense.weight": (d, d),
            "dense.bias": (d,),
            "layer_norm.weight": (d,),
            "layer_norm.bias": (d,),
            "weight": (config.vocabulary_size, d),
            "bias": (config.vocabulary_size,),
        },
        "contact_head": {
            "regression.weight": (1, config.num_layers * config.attention_heads),
            "regression.bias": (1,),
        },
    }


def load_model(path: Path, device: torch.device, dtype: torch.dtype, pack: bool = True) -> ESM2:
    """Load a checkpoint into the packed model, ready for inference.

    Parameters
    ----------
    path
        A checkpoint, as of `read`.
    device, dtype
        The device, and the compute type of matrix products; embeddings and LayerNorms stay in float32.
    pack
        Whether a CPU packs the weights for oneDNN, which is faster and supports no gradients.
    """
    config, state, *_ = read(path)
    model = load_ends(path, device)
    for index in range(config.num_layers):  # one at a time, so that the host never holds two copies of the model
        model.layers[index] = _layer_of(state, config, index, device, dtype, pack)
    return model


def load_ends(path: Path, device: torch.device) -> ESM2:
    """Load what lies before and behind the layers; these have no weights yet."""
    config, state, *_ = read(path)
    with torch.device("meta"):
        model = ESM2(config)
    frequencies = [state[f"layers.{index}.self_attn.rot_emb.inv_freq"].float() for index in range(config.num_layers)]
    if any(not torch.equal(frequencies[0], other) for other in frequencies):
        raise LengthwiseError(f"{path}: its layers hold different rotary frequencies, which no ESM-2 has")
    outer = [name for name in state if name.startswith(("embed_tokens.", "emb_layer_norm_after."))]
    ends = {name: _copy_of(state[name], device) for name in outer}
    ends["inv_freq"] = _copy_of(frequencies[0], device)
    model.load_state_dict(ends, assign=True, strict=False)
    return model.eval().requires_grad_(False)


def load_layer(path: Path, index: int, device: torch.device, dtype: torch.dtype, pack: bool = True) -> Layer:
    """Load the weights of one layer, as `load_model` does. The file is closed again, so none of it stays mapped."""
    config, state, *_ = read(path)
    return _layer_of(state, config, index, device, dtype, pack)


def _layer_of(
    state: dict[str, torch.Tensor],
    config: ModelConfig,
    index: int,
    device: torch.device,
    dtype: torch.dtype,
    pack: bool,
) -> Layer:
    with torch.device("meta"):
        layer = Layer(config)
    pairs, prefix, fused = paired_rows(config), f"layers.{index}.", {}
    for kind in ("weight", "bias"):
        parts = [state[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"]
        parts[:2] = [part[pairs] for part in parts[:2]]
        fused[f"qkv.{kind}"] = torch.cat([part.to(device, dtype) for part in parts])
        fused[f"out_proj.{kind}"] = _copy_of(state[f"{prefix}self_attn.out_proj.{kind}"], device, dtype)
        for name in ("fc1", "fc2"):
            fused[f"{name}.{kind}"] = _copy_of(state[f"{prefix}{name}.{kind}"], device, dtype)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            fused[f"{name}.{kind}"] = _copy_of(state[f"{prefix}{name}.{kind}"], device)
    layer.load_state_dict(fused, assign=True)
    del fused  # packing replaces weights one by one
    for module in layer.modules():
        if pack and isinstance(module, Linear):
            module.pack()
    return layer.eval().requires_grad_(False)


def _copy_of(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # Always copied: a tensor mapped to the file would change with the file.
    return tensor.to(device, dtype, copy=True)


def write_random(path: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write a seeded random checkpoint of a model's exact shape, in fair-esm's layout and type.

    Timings with it are real; its embeddings are meaningless. Weights have a standard deviation of 1 / sqrt(fan in). LayerNorms
    and biases are random too, so that an error in any of them shows in the output. The rotary frequencies are rounded to half
    precision, as in the published checkpoints.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    # The published checkpoints of 3B and 15B are 5.7 and 30 GB: two bytes a weight.
    dtype = torch.float16 if config.embed_dim >= MODELS["esm2_t36_3B_UR50D"].embed_dim else torch.float32

    def normal(*shape: int, scale: float, shift: float = 0.0) -> torch.Tensor:
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(scale)
        values += np.float32(shift)
        return torch.from_numpy(values).to(dtype)

    d, state = config.embed_dim, {}

    def linear(name: str, fan_in: int, fan_out: int) -> None:
        state[f"{name}.weight"] = normal(fan_out, fan_in, scale=fan_in**-0.5)
        state[f"{name}.bias"] = normal(fan_out, scale=0.1)

    def layer_norm(name: str) -> None:
        state[f"{name}.weight"] = normal(d, scale=0.2, shift=1.0)
        state[f"{name}.bias"] = normal(d, scale=0.1)

    inv_freq = computed_inv_freq(config)
    encoder = "encoder.sentence_encoder."
    state[f"{encoder}embed_tokens.weight"] = normal(config.vocabulary_size, d, scale=1.0)
    for index in range(config.num_layers):
        layer = f"{encoder}layers.{index}."
        for part in ("k", "v", "q", "out"):
            linear(f"{layer}self_attn.{part}_proj", d, d)
        state[f"{layer}self_attn.rot_emb.inv_freq"] = inv_freq.half().float()
        layer_norm(f"{layer}self_attn_layer_norm")
        linear(f"{layer}fc1", d, 4 * d)
        linear(f"{layer}fc2", 4 * d, d)
        layer_norm(f"{layer}final_layer_norm")
    layer_norm(f"{encoder}emb_layer_norm_after")
    state["encoder.lm_head.weight"] = state[f"{encoder}embed_tokens.weight"]
    state["encoder.lm_head.bias"] = normal(config.vocabulary_size, scale=0.1)
    linear("encoder.lm_head.dense", d, d)
    layer_norm("encoder.lm_head.layer_norm")
    model = argparse.Namespace(
        encoder_layers=config.num_layers,
        encoder_embed_dim=d,
        encoder_attention_heads=config.attention_heads,
        token_dropout=True,
        **{fair_esm_layout.RANDOM_SEED_KEY: seed},
    )
    with open(path, "wb") as file:  # not a path: torch would write its stem into the bytes
        torch.save({"cfg": {"model": model}, "model": state}, file)


def write_random_regression(path: Path, config: ModelConfig, seed: int = 0) -> None:
    """Write seeded random weights of a model's contact head, in fair-esm's layout."""
    rng, heads = np.random.Generator(np.random.PCG64(seed)), config.num_layers * config.attention_heads
    state = {
        "contact_head.regression.weight": torch.from_numpy(rng.standard_normal((1, heads), dtype=np.float32)),
        "contact_head.regression.bias": torch.tensor([-3.0]),
    }
    with open(path, "wb") as file:  # not a path: torch would write its stem into the bytes
        torch.save({"model": state}, file)


def reference_model(path: Path, device: torch.device | str = "cpu") -> torch.nn.Module:
    """fair-esm's own ESM2 with a checkpoint's weights, in float32: the reference for tests and parity."""
    from esm.model import esm2

    config, state, *_ = read(path)
    with torch.device(device):
        model = esm2.ESM2(config.num_layers, config.embed_dim, config.attention_heads)
    model.load_state_dict(state, strict=False)  # a .pt has the contact head's weights in another file
    return model.eval()


def _required_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that the forward pass needs, with their shapes."""
    d = config.embed_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocabulary_size, d),
        "emb_layer_norm_after.weight": (d,),
    }
    shapes["emb_layer_norm_after.bias"] = (d,)
    for index in range(config.num_layers):
        layer = f"layers.{index}."
        parts: dict[str, tuple[int, ...]] = {}
        for part in ("k", "v", "q"):
            parts[f"self_attn.{part}_proj"] = (d, d)
        parts |= {"self_attn.out_proj": (d, d), "fc1": (4 * d, d), "fc2": (d, 4 * d)}
        parts |= {"self_attn_layer_norm": (d,), "final_layer_norm": (d,)}
        for part, shape in parts.items():
            shapes[f"{layer}{part}.weight"] = shape
            shapes[f"{layer}{part}.bias"] = shape[:1]
        shapes[f"{layer}self_attn.rot_emb.inv_freq"] = (config.head_dim // 2,)
    return shapes
