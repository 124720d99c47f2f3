"""Random weights for the benchmark; those of the largest models are made in seconds."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.shapes import ModelConfig

# Making larger models takes minutes and tens of gigabytes of memory and disk.
MOST_PARAMETERS = 1e9


def write_weights(path: Path, config: ModelConfig) -> None:
    """Write a random checkpoint of a model's exact shape. The layers of the largest models share one layer's weights.

    They are separate on a device, so that timings and memory are the same.
    """
    if config.parameters < MOST_PARAMETERS:
        write_random(path, config)
        return
    write_random(path, replace(config, num_layers=1))
    with torch.serialization.safe_globals([argparse.Namespace]):
        data = torch.load(path, weights_only=True)
    data["cfg"]["model"].encoder_layers = config.num_layers
    for name, tensor in list(data["model"].items()):
        if ".layers.0." in name:
            for index in range(1, config.num_layers):
                data["model"][name.replace(".layers.0.", f".layers.{index}.")] = tensor
    torch.save(data, path)
