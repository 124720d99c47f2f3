"""Seeded checkpoints that are like trained ones: sharp attention, larger projections, massive channels, uneven LayerNorms.

`write_random` alone is too kind a judge: its attention is flat, so that a wrong angle hardly shows and rounding hardly grows.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.shapes import ModelConfig

# The head sizes of the six models, at small widths.
SHAPES = {
    "8M": ModelConfig(3, 64, 4),
    "35M": ModelConfig(3, 72, 3),
    "150M": ModelConfig(3, 64, 2),
    "650M": ModelConfig(3, 128, 2),
    "3B": ModelConfig(3, 192, 3),
    "15B": ModelConfig(3, 256, 2),
}


@dataclass(frozen=True)
class Kind:
    """What is changed in a random checkpoint."""

    qk: float = 1  # factor on the weights of q and k; 4 leaves about 3 keys that are attended, of 240
    others: float = 1  # factor on the weights of v, out, fc1 and fc2
    massive: float = 0  # size of three channels of the residual sums, from the first layer on
    massive_bos: float = 0  # size of the same channels, of BOS alone and from the embedding on
    gains: float = 1  # largest gain of every LayerNorm over its smallest


KINDS = {
    "flat": Kind(),
    "q,k x 4": Kind(qk=4),
    "q,k x 8": Kind(qk=8),
    "q,k x 4, others x 3": Kind(qk=4, others=3),
    "q,k x 6, others x 3, massive 3,000": Kind(qk=6, others=3, massive=3_000),
    "massive 3,000": Kind(massive=3_000),
    "gains x 100": Kind(gains=100),
    "q,k x 4, massive 3,000, gains x 100": Kind(qk=4, massive=3_000, gains=100),
    "q,k x 4, massive BOS": Kind(qk=4, massive_bos=3_000),
    "massive 30,000": Kind(massive=30_000),  # near float16's largest number, 65,504
}

# bfloat16 moves a channel by half of its spread, and float32 some tokens by a thousand times what it moves others.
CHAOTIC = {"q,k x 8"}


def write(path: Path, config: ModelConfig, kind: str = "flat", seed: int = 0) -> None:
    """Write the checkpoint of a shape that `KINDS` names."""
    write_random(path, config, seed)
    change = KINDS[kind]
    if change == Kind():
        return
    with torch.serialization.safe_globals([argparse.Namespace]):
        data = torch.load(path, weights_only=True)
    state = {name.removeprefix("encoder.sentence_encoder."): tensor for name, tensor in data["model"].items()}
    for index in range(config.num_layers):
        for part in ("self_attn.q_proj", "self_attn.k_proj"):
            state[f"layers.{index}.{part}.weight"] *= change.qk
        for part in ("self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"):
            state[f"layers.{index}.{part}.weight"] *= change.others
    if change.massive:
        _set_massive(state["layers.0.fc2.bias"], change.massive)
    if change.massive_bos:
        _set_massive(state["embed_tokens.weight"][0], change.massive_bos)
    if change.gains > 1:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in state.items():
            if name.endswith("layer_norm.weight") or name == "emb_layer_norm_after.weight":
                gains = change.gains ** torch.rand(tensor.shape, generator=generator)
                tensor.copy_(gains / gains.square().mean().sqrt())  # the scores stay as sharp as they were
    torch.save(data, path)


def _set_massive(values: torch.Tensor, size: float) -> None:
    """values [D]"""
    width = len(values)
    for channel, sign in ((width // 64, 1), (width // 4, -1), (width // 2, 1)):
        values[channel] = sign * size
