"""What a job asks a scheduler for at its first attempt: host memory, disk and minutes.

Generous where nothing was measured; retries multiply memory and minutes (`workflow/rules/resources.smk`).
"""

import numpy as np
import pandas as pd

from lengthwise.esm2.costs import ASSUMED_FLOPS, result_bytes_per_token
from lengthwise.esm2.residency import LAYERS_HELD, LAYERS_ON_HOST, layer_bytes, streamed_batch_tokens, wave_bytes
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, MOST_AT_ONCE
from lengthwise.plan.process import PARITY_SECONDS, PARITY_SHARE, PROCESS_BYTES, START_SECONDS
from lengthwise.plan.throughput import MEASURED_THREADS
from lengthwise.store.settings import shape_of
from lengthwise.system.machine import READ_BYTES_PER_SECOND

# Ratio of requested to forecast minutes: a card may be slower, a node shared.
RUNTIME_MARGIN = 3.0
DISK_MARGIN = 1.05
# Python's objects for a sequence of the work order, beside its residues.
SEQUENCE_BYTES = 300
# Batches whose results are on the host at once beside those in computation: waiting for the writer, and being written.
BATCHES_WAITING = 4
# Sequences of the parity receipt, and residues of the longest, that memory is asked for; with less free it takes fewer.
PARITY_SAMPLE = (4, 250)


def job_requests(jobs: pd.DataFrame, settings: dict, checkpoint_bytes: int, residency: str = "auto") -> pd.DataFrame:
    """What jobs that embed ask for.

    Parameters
    ----------
    jobs
        With the columns sequences, residues, longest (residues), forecast_bytes and forecast_seconds.
    settings
        The store's settings.
    checkpoint_bytes
        Size of the checkpoint's file.
    residency
        As the config has it; auto asks for what resident weights take.

    Returns
    -------
    The columns mem_mb, disk_mb and runtime_minutes (integers, rounded up), with the index of `jobs`.
    """
    seconds = START_SECONDS + checkpoint_bytes / READ_BYTES_PER_SECOND + PARITY_SECONDS
    seconds += RUNTIME_MARGIN * (1 + PARITY_SHARE) * jobs["forecast_seconds"]
    columns = {
        "mem_mb": _host_memory_bytes(jobs, settings, checkpoint_bytes, residency == "streamed") / 1e6,
        "disk_mb": DISK_MARGIN * jobs["forecast_bytes"] / 1e6,
        "runtime_minutes": seconds / 60,
    }
    return pd.DataFrame({name: np.ceil(values).astype(int) for name, values in columns.items()}, index=jobs.index)


def _host_memory_bytes(jobs: pd.DataFrame, settings: dict, checkpoint_bytes: int, streamed: bool) -> pd.Series:
    """Process, checkpoint, work order and results; on a CPU the weights and the forward pass too."""
    device, shape = settings["device"], shape_of(settings)
    batches_at_once = MOST_AT_ONCE if device == "cpu" else 1
    longest_tokens = jobs["longest"] + 2
    work_order_bytes = 2 * jobs["residues"] + SEQUENCE_BYTES * jobs["sequences"]
    itemsize, batch_tokens = 4 if settings["precision"] == "float32" else 2, AUTO_BATCH_TOKENS[device]
    if streamed and device == "cpu":
        batch_tokens = streamed_batch_tokens(shape, itemsize, batches_at_once)
    result_tokens = np.maximum(longest_tokens, batches_at_once * batch_tokens)
    result_tokens += BATCHES_WAITING * np.maximum(longest_tokens, batch_tokens)
    stored_bytes = 4 * shape.embed_dim * len(settings["layers"])
    if more := {"logits", "contacts"} & {*settings["outputs"]}:
        stored_bytes += result_bytes_per_token(0, 0, more, 4, settings.get("contacts_max_residues", 0))
    total = PROCESS_BYTES[device] + work_order_bytes + result_tokens * stored_bytes
    if streamed:
        tokens = jobs["residues"] + 2 * jobs["sequences"]
        rate = batches_at_once / MEASURED_THREADS * ASSUMED_FLOPS[device]
        of_wave = wave_bytes(shape, device, itemsize, stored_bytes, tokens, rate)
        # On a GPU's host a wave is what room there is for results.
        total += of_wave if device == "cpu" else LAYERS_ON_HOST * layer_bytes(shape, 4)
    else:
        total += checkpoint_bytes  # mapped into memory while it loads
        total += shape.parameters * itemsize if device == "cpu" else 0
    if device == "cpu":
        total += shape.resident_bytes(itemsize, batch_tokens, batches_at_once)
        total += shape.resident_bytes_alone(itemsize, 1) * jobs["longest"]
        # The parity receipt: a layer of fair-esm in float64, and this engine in float32.
        twin = LAYERS_HELD[device] * layer_bytes(shape, 4) if streamed else shape.parameters * 4
        total += shape.reference_bytes(8, *PARITY_SAMPLE) + (twin if itemsize == 2 else 0)
    return total
