"""Batching: where sequences are cut into batches, and how batches are prepared ahead of the device."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
# Smaller batches leave a GPU idle anyway.
_MIN_BATCH_TOKENS = 1_024


def cut_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut consecutive sequences into batches.

    All lengths of a batch have the same bit length (they lie between two powers of two), so that kernels see few shapes.

    Parameters
    ----------
    lengths
        [N] residues of each sequence, in order.
    batch_tokens
        Most tokens of a batch, specials included. A longer sequence is a batch by itself.

    Yields
    ------
    (start, stop)
        Bounds of a batch among the sequences.
    """
    tokens_up_to = np.cumsum(lengths + 2, dtype=np.int64)  # [N] of each sequence and all before it
    bit_lengths = np.frexp(lengths)[1]  # [N]
    changes = np.flatnonzero(bit_lengths[1:] != bit_lengths[:-1]) + 1
    start, tokens_before = 0, 0
    for end in [*changes.tolist(), len(lengths)]:
        while start < end:
            fitting = int(np.searchsorted(tokens_up_to, tokens_before + batch_tokens, side="right"))
            stop = min(max(fitting, start + 1), end)
            yield start, stop
            start, tokens_before = stop, int(tokens_up_to[stop - 1])


def prefetch(
    prepare: Callable[[Item], Prepared], items: Iterable[Item], depth: int = 2
) -> Iterator[tuple[Prepared, float]]:
    """Prepare items on a thread, up to `depth` ahead of the consumer.

    Yields
    ------
    (prepared, waited_ms)
        ``prepare(item)`` for each item in order, and how long the consumer waited for it.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[Prepared]] = deque()
        remaining = iter(items)
        while True:
            pending.extend(pool.submit(prepare, item) for item in islice(remaining, depth + 1 - len(pending)))
            if not pending:
                return
            began = time.perf_counter()
            prepared = pending.popleft().result()
            waited_ms = (time.perf_counter() - began) * 1000
            yield prepared, waited_ms
            del prepared  # it may be large, and the next one is prepared now


def fitting_tokens(free_bytes: float, bytes_per_token: float, max_tokens: int) -> int:
    """Tokens of a batch that fit into free memory, between 1,024 and `max_tokens`."""
    return max(_MIN_BATCH_TOKENS, min(max_tokens, int(free_bytes / bytes_per_token)))
