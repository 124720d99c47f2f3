"""The device's rate in plain matrix products of the shapes that the engine multiplies."""

import math
import time

import torch

from lengthwise.esm2.shapes import ModelConfig

SECONDS = 0.3


@torch.inference_mode()
def matmul_rate(config: ModelConfig, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Floating-point operations per second of the four products of one layer.

    The device is waited for once, after all products: a wait after each layer would leave it idle in between.

    Parameters
    ----------
    config
        The model's shape.
    device, dtype
        Where, and in which type.
    tokens
        Tokens of a batch.
    """
    d = config.embed_dim
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]  # q, k and v; out; fc1; fc2
    pairs = [
        (torch.randn(tokens, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype))
        for k, n in shapes
    ]
    passes = 1  # the first is the warm-up
    while True:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(passes):
            for x, weight in pairs:
                x @ weight.T
        synchronize(device)
        elapsed = time.perf_counter() - began
        if passes > 1 and elapsed >= SECONDS:
            return passes * sum(2 * tokens * k * n for k, n in shapes) / elapsed
        passes = max(2 * passes, math.ceil(1.2 * SECONDS * passes / elapsed))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
