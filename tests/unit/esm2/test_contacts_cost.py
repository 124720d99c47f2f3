"""What contacts cost beside the embedding of a protein, by the kernel's account of this process."""

import ctypes
import gc
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lengthwise.esm2.checkpoint import write_random, write_random_regression
from lengthwise.esm2.contacts import ContactHead, ContactSums
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.fair_esm_layout import contact_regression_path
from lengthwise.esm2.model import Packing
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import MODELS


def resident(what: str) -> int:
    """VmRSS, the process's memory, or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def cost(engine: Engine, output: Output, sequence: bytes) -> tuple[int, float, int]:
    """Peak memory beside what was there, processor seconds, and bytes of contacts."""
    engine.output = output
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.process_time()
    (result,) = engine.embed([[sequence]])
    seconds = time.process_time() - began
    contacts = result.arrays.get("contacts", np.empty(0, np.float16))
    return resident("VmHWM") - before, seconds, contacts.nbytes


class LargestTensor(TorchDispatchMode):
    """Notes the numbers of the largest tensor that operators make."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given:  # a view is no memory
                self.largest = max(self.largest, each.numel())
        return made


@pytest.mark.parametrize("lengths", [[200], [40] * 6 + [60]])
def test_a_layers_maps_are_never_all_there(lengths):
    heads, channels, block = 20, 16, 20_000
    q, k = torch.randn(2, sum(lengths), heads, channels).unbind()
    sums = ContactSums(ContactHead(torch.randn(3, heads), torch.zeros(1)), Packing.of(lengths), 500, 4 * block)
    with LargestTensor() as seen:
        sums.add(2, q, k)
    rows_and_sums = max(block, max(lengths) ** 2, heads * max(lengths) * channels)
    assert block / 4 <= seen.largest <= rows_and_sums
    assert heads * max(lengths) ** 2 > rows_and_sums


@pytest.mark.huge
def test_contacts_of_a_thousand_residues_take_half_of_the_memory_more_and_three_times_the_time_at_most(tmp_path):
    name = "esm2_t33_650M_UR50D"
    path, shape = tmp_path / "weights.pt", MODELS[name]
    write_random(path, shape)
    write_random_regression(contact_regression_path(path), shape)
    output = Output((shape.num_layers,), ("residue", "mean", "contacts"), "float16", contacts_max_residues=1_000)
    engine = Engine(path, torch.device("cpu"), "float32", output)
    without, sequence = replace(output, outputs=("residue", "mean")), b"ACDEFGHIKLMNPQRSTVWY" * 50
    for each in (without, output):
        cost(engine, each, sequence)
    pairs = [(cost(engine, without, sequence), cost(engine, output, sequence)) for _ in range(3)]
    memory = [(more[0] - more[2]) / plain[0] for plain, more in pairs]
    times = [more[1] / plain[1] for plain, more in pairs]
    print(f"memory {[round(each, 2) for each in memory]}, time {[round(each, 2) for each in times]}")
    assert np.median(memory) <= 1.5
    assert np.median(times) <= 3
