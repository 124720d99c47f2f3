"""What jobs ask a scheduler for: host memory, disk and minutes. Generous where nothing was measured; retries ask for more."""

import numpy as np
import pandas as pd

from lengthwise.esm2.config import AUTO_BATCH_TOKENS, MOST_AT_ONCE
from lengthwise.store.settings import shape_of

# Python and torch, before any work. 0.4 GB were measured on the CPU; what CUDA's libraries, its context and the processes
# of torch.compile take is assumed.
PROCESS_BYTES = {"cpu": 1.0e9, "cuda": 8.0e9}

# Assumed of a shared file system that others read from too.
READ_BYTES_PER_SECOND = 200e6

# Starting Python and torch on a node, and compiling.
START_SECONDS = 300.0

# How many times as long as forecast a job may take: a slower card, a neighbour.
PATIENCE = 3.0

# Python's objects for a sequence of a job's spec, beside its residues.
SEQUENCE_BYTES = 300

# Batches whose results are on the host at once beside those that are computed: waiting to be written, being written.
BATCHES_WAITING = 4


def ask(jobs: pd.DataFrame, settings: dict, checkpoint_bytes: int) -> pd.DataFrame:
    """What jobs that embed ask for at their first attempt.

    Parameters
    ----------
    jobs
        With the columns sequences, residues, longest (in residues), forecast_bytes and forecast_seconds.
    settings
        The store's.
    checkpoint_bytes
        Size of the checkpoint's file.

    Returns
    -------
    The columns mem_mb, disk_mb and runtime_minutes, with the rows of `jobs`.
    """
    device, itemsize = settings["device"], 4 if settings["precision"] == "float32" else 2
    shape = shape_of(settings)
    at_once = MOST_AT_ONCE if device == "cpu" else 1
    tokens = np.maximum(jobs["longest"] + 2, at_once * AUTO_BATCH_TOKENS[device])  # in batches that are computed
    # The checkpoint is mapped into memory while it loads.
    host = PROCESS_BYTES[device] + checkpoint_bytes + 2 * jobs["residues"] + SEQUENCE_BYTES * jobs["sequences"]
    results = tokens + BATCHES_WAITING * np.maximum(jobs["longest"] + 2, AUTO_BATCH_TOKENS[device])
    host += results * shape.embed_dim * len(settings["layers"]) * 4
    if device == "cpu":
        host += shape.parameters * itemsize + shape.resident_bytes(itemsize, AUTO_BATCH_TOKENS[device], at_once)
        host += shape.resident_bytes_alone(itemsize, 1) * jobs["longest"]
    seconds = START_SECONDS + checkpoint_bytes / READ_BYTES_PER_SECOND + PATIENCE * jobs["forecast_seconds"]
    columns = {"mem_mb": host / 1e6, "disk_mb": jobs["forecast_bytes"] * 1.05 / 1e6, "runtime_minutes": seconds / 60}
    return pd.DataFrame({name: np.ceil(values).astype(int) for name, values in columns.items()}, index=jobs.index)
