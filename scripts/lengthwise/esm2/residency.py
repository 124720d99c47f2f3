"""Where weights are while a job computes: all loaded (resident), or a layer at a time (streamed).

Streamed, all batches of a wave pass through a layer before the next one: its weights are read once for the wave, and while the
wave computes with them the next layer's are read. Two layers' weights and the sums of the wave are in memory. Imports no torch.
"""

from math import ceil
from typing import TYPE_CHECKING, overload

from lengthwise.esm2.costs import ASSUMED_FLOPS
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MEMORY_MARGIN, ModelConfig

if TYPE_CHECKING:
    import pandas as pd

# A job that is killed loses a wave at most.
WAVE_SECONDS = 300.0
# Layers in memory: one that computes, one that is loaded, and what loading takes beside: the checkpoint's pages and a copy.
LAYERS_HELD = {"cpu": 4, "cuda": 2}
# On a GPU's host, in float32 at most: the layer that is read, its copy in the compute type, and two in pinned memory.
LAYERS_ON_HOST = 4
# Smaller products do not keep a core busy.
MIN_BATCH_TOKENS = 256
# torch rounds a tensor in pinned memory up to a power of two.
PINNED_SHARE = 0.5
# Bytes of a checkpoint that are read in a second, on the slow side; a wave is no shorter than reading all layers takes.
WEIGHTS_PER_SECOND = {"cpu": 0.5e9, "cuda": 2e9}


def layer_bytes(shape: ModelConfig, itemsize: int) -> int:
    """The weights of one layer, in a type of this many bytes."""
    return itemsize * (12 * shape.embed_dim**2 + 13 * shape.embed_dim)


def computing_bytes(
    shape: ModelConfig, device: str, itemsize: int, cores: int, batch_tokens: int = AUTO_BATCH_TOKENS["cpu"]
) -> int:
    """What batches take beside the weights while they compute: one on each core of a CPU, the smallest on a GPU.

    Parameters
    ----------
    shape, itemsize
        As of `ModelConfig.bytes_per_token`.
    device
        cpu or cuda.
    cores
        Cores that compute a batch each.
    batch_tokens
        Tokens of a batch on a CPU.
    """
    if device == "cpu":
        return shape.resident_bytes(itemsize, batch_tokens, cores)
    return 1_024 * shape.bytes_per_token(itemsize)


def streamed_batch_tokens(shape: ModelConfig, itemsize: int, cores: int) -> int:
    """Tokens of a batch on a CPU where weights are streamed: small where a wave is, so that it has a batch for each core."""
    in_a_wave = tokens_in_time(shape, "cpu", itemsize)
    return max(MIN_BATCH_TOKENS, min(AUTO_BATCH_TOKENS["cpu"], in_a_wave // cores))


def fits_resident(shape: ModelConfig, device: str, itemsize: int, cores: int, free_bytes: float) -> bool:
    """Whether all weights and batches fit into the device's free memory."""
    needed = itemsize * shape.parameters + computing_bytes(shape, device, itemsize, cores)
    return needed <= MEMORY_MARGIN * free_bytes


def beside_weights(shape: ModelConfig, itemsize: int, gpu_bytes: float) -> tuple[float, bool]:
    """What a GPU with this much memory has left for batches beside the weights, and whether these are streamed."""
    streamed = not fits_resident(shape, "cuda", itemsize, 1, gpu_bytes)
    held = LAYERS_HELD["cuda"] * layer_bytes(shape, itemsize) if streamed else itemsize * shape.parameters
    return MEMORY_MARGIN * gpu_bytes - held, streamed


@overload
def wave_bytes(
    shape: ModelConfig,
    device: str,
    itemsize: int,
    stored_bytes: int,
    tokens: int,
    flops_per_second: float | None = None,
) -> int: ...
@overload
def wave_bytes(
    shape: ModelConfig,
    device: str,
    itemsize: int,
    stored_bytes: int,
    tokens: "pd.Series",
    flops_per_second: float | None = None,
) -> "pd.Series": ...
def wave_bytes(
    shape: ModelConfig,
    device: str,
    itemsize: int,
    stored_bytes: int,
    tokens: "int | pd.Series",
    flops_per_second: float | None = None,
) -> "int | pd.Series":
    """What layers and the longest wave of a job take, without the process and computing.

    Parameters
    ----------
    shape, itemsize, stored_bytes
        As of `ModelConfig.bytes_per_token`.
    device
        cpu or cuda.
    tokens
        Tokens of the job, or of several jobs.
    flops_per_second
        As of `tokens_in_time`.
    """
    most = tokens_in_time(shape, device, itemsize, flops_per_second)
    in_a_wave = min(tokens, most) if isinstance(tokens, int) else tokens.clip(upper=most)
    return LAYERS_HELD[device] * layer_bytes(shape, itemsize) + in_a_wave * (sums_bytes(shape) + stored_bytes)


def sums_bytes(shape: ModelConfig) -> int:
    """The residual sums of a token and its angles, in float32."""
    return 4 * shape.embed_dim + 4 * shape.head_dim


def room_for_wave(shape: ModelConfig, device: str, itemsize: int, free_bytes: float, beside_bytes: float) -> float:
    """Bytes that a device has for the sums and the results of a wave.

    Parameters
    ----------
    shape, itemsize
        As of `ModelConfig.bytes_per_token`.
    device
        cpu or cuda.
    free_bytes
        Free memory of the device before a layer is loaded.
    beside_bytes
        What computing takes beside weights and sums.
    """
    return MEMORY_MARGIN * free_bytes - LAYERS_HELD[device] * layer_bytes(shape, itemsize) - beside_bytes


def room_for_results(shape: ModelConfig, free_bytes: float) -> float:
    """Bytes that a GPU's host has for the results of a wave, which wait in pinned memory; of the host's free memory."""
    return PINNED_SHARE * (MEMORY_MARGIN * free_bytes - LAYERS_ON_HOST * layer_bytes(shape, 4))


def streamed_seconds(shape: ModelConfig, computing: float, reading: float) -> float:
    """Seconds of a job that computes for `computing` seconds and reads all weights in `reading`, with streamed weights.

    Of a wave's layers all but the first are read beside the work.
    """
    waves = max(1, ceil(computing / max(WAVE_SECONDS, reading)))
    return max(computing, waves * reading) + waves * reading / shape.num_layers


def tokens_in_time(
    shape: ModelConfig,
    device: str,
    itemsize: int,
    flops_per_second: float | None = None,
    read_seconds: float | None = None,
) -> int:
    """Tokens of a wave that are computed in `WAVE_SECONDS`, or while all weights are read if that takes longer.

    Parameters
    ----------
    shape, device, itemsize
        As of `room_for_wave`.
    flops_per_second, read_seconds
        Measured, if they are: speed without waiting for weights, and the time of reading them.
    """
    read_seconds = read_seconds or itemsize * shape.parameters / WEIGHTS_PER_SECOND[device]
    rate = flops_per_second or ASSUMED_FLOPS[device]
    return max(1, int(rate * max(WAVE_SECONDS, read_seconds) / (shape.flops(300) / 302)))


def hiding_tokens(shape: ModelConfig, device: str, itemsize: int) -> int:
    """Tokens whose computing takes as long as reading all weights, by what is assumed of both; of proteins of 300 residues."""
    read_seconds = itemsize * shape.parameters / WEIGHTS_PER_SECOND[device]
    return int(ASSUMED_FLOPS[device] * read_seconds / (shape.flops(300) / 302))
