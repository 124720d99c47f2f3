"""Cutting sequences into batches, and preparing them ahead of the device."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np


def cut_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """Bounds (start, stop) of consecutive sequences that go through one forward pass.

    A batch has at most `batch_tokens` tokens, specials included, unless it is one long sequence; and all its lengths lie in
    one bin between two powers of two, so that kernels see few shapes.
    """
    start, tokens, current = 0, 0, None
    for i, length in enumerate(lengths):
        length_bin = int(length).bit_length()
        size = int(length) + 2
        if i > start and (tokens + size > batch_tokens or length_bin != current):
            yield start, i
            start, tokens = i, 0
        tokens, current = tokens + size, length_bin
    if len(lengths):
        yield start, len(lengths)


def ahead(function: Callable, items: Iterable, depth: int = 2) -> Iterator[tuple[object, float]]:
    """function(item) of each item in order, up to `depth` of them computed ahead on a thread; and the ms waited for each."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future] = deque()
        items = iter(items)
        while True:
            waiting.extend(pool.submit(function, item) for item in islice(items, depth + 1 - len(waiting)))
            if not waiting:
                return
            began = time.perf_counter()
            result = waiting.popleft().result()
            yield result, (time.perf_counter() - began) * 1000


def fitting_tokens(free_bytes: float, bytes_per_token: float, most: int) -> int:
    """Tokens of a batch that fit, at most `most`; a kilotoken at least, below which a GPU idles anyway."""
    return max(1_024, min(most, int(free_bytes / bytes_per_token)))
