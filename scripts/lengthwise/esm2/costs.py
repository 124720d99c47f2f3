"""What the work costs before anything was measured."""

import numpy as np

from lengthwise.esm2.config import ModelConfig

# Floating-point operations per second assumed before anything was measured: two cores of a 2023 server in float32, and a
# third of an A100's dense float16 peak (https://www.nvidia.com/en-us/data-center/a100/).
ASSUMED_FLOPS = {"cpu": 60e9, "cuda": 100e12}


def forecast_seconds(lengths: np.ndarray, shape: ModelConfig, device: str) -> np.ndarray:
    """Seconds that sequences of these lengths are assumed to take on a device: cpu or cuda."""
    return shape.flops(lengths.astype(np.float64)) / ASSUMED_FLOPS[device]
