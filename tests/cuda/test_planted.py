"""Planted bugs of order and placement: the rehearsal fails on each. What CUDA would do is in the comments."""

import numpy as np
import pytest
import torch
from order import Event, OutOfOrder, Stream
from pretend import Card, Device
from rehearsal import (
    BATCHES,
    TURING,
    embed,
    load,
    pretended,
    random_sequences,
    rows,
    the_host_waits_for_results_alone,
)

from lengthwise.esm2 import engine as engine_module
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.residency import layer_bytes
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.streamed import StreamedEngine


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    write_random(path, ModelConfig(2, 32, 2))
    return path


def skip_waits(of_default_stream):
    """Of the computing stream for the copies in, or of the others for it."""

    def plant(monkeypatch):
        wait_stream = Stream.wait_stream

        def skipping(self, other):
            if (self.name == "default") != of_default_stream:
                wait_stream(self, other)

        monkeypatch.setattr(Stream, "wait_stream", skipping)

    return plant


def forget_record_stream(monkeypatch):
    """The next batch's tokens are copied over those that the GPU still reads."""
    monkeypatch.setattr(Device, "record_stream", lambda *_: None)


def forget_results(monkeypatch):
    """The next batch's numbers are written over results that are not copied yet."""
    forward = engine_module.Engine._forward

    def forgetting(*given):
        started = forward(*given)
        started.on_device = None
        return started

    monkeypatch.setattr(engine_module.Engine, "_forward", forgetting)


def change_pool(change):
    def plant(monkeypatch):
        pool = Output.pool
        monkeypatch.setattr(Output, "pool", lambda self, hidden, packing: change(pool(self, hidden, packing)))

    return plant


def ask_for_a_number(results):
    assert results["mean_1"].sum().item() != 0
    return results


def select_by_mask(results):
    return results | {"mean_1": results["mean_1"][results["mean_1"][:, 0].isfinite()]}


def copy_to_host(results):
    return results | {"mean_1": results["mean_1"].cpu().to("cuda")}


def add_from_host(results):
    return {name: value + torch.zeros(value.shape[-1]) for name, value in results.items()}


def read_as_array(results):
    np.asarray(results["mean_1"])
    return results


def forget_to_pin(monkeypatch):
    """The host waits for each copy."""
    monkeypatch.setattr(Device, "pin", lambda self, tensor: tensor)


def pad_on_host(monkeypatch):
    """A tensor without a device is the CPU's."""
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *given, device=None, **named: arange(*given, **named))


BUGS = {
    "compute does not wait for tokens": (
        skip_waits(of_default_stream=True),
        "reads what a side stream may not have written yet",
    ),
    "copies do not wait for results": (skip_waits(of_default_stream=False), "reads what default may not have written"),
    "no record_stream": (forget_record_stream, "memory of a side stream is freed while default may use it"),
    "results are freed early": (forget_results, "memory of default is freed while a side stream may use it"),
    "nothing is pinned": (forget_to_pin, "'a blocking copy'"),
    ".item()": (change_pool(ask_for_a_number), "'item'"),
    "a boolean mask": (change_pool(select_by_mask), "'__getitem__'"),
    "to the host and back": (change_pool(copy_to_host), "'a blocking copy'"),
    "another device": (change_pool(add_from_host), "Expected all tensors to be on the same device"),
    "an array of a tensor on the device": (
        change_pool(read_as_array),
        "can't convert cuda:0 device type tensor to numpy",
    ),
    "a tensor without its device": (pad_on_host, "Expected all tensors to be on the same device"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(weights, monkeypatch, bug):
    plant, words = BUGS[bug]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, TypeError)) as caught:
        embed(weights, "float16", Card(capability=TURING))
    assert words in str(caught.value)


def record_done_early(monkeypatch):
    """The loading thread takes a layer to be done before its work: a GPU that lags behind the host holds one layer more."""
    wait_event, record_event, early = Stream.wait_event, Stream.record_event, []

    def wait(self, event):
        early.append(record_event(self))
        wait_event(self, event)

    def record(self, event=None):
        return early.pop() if self.name == "default" else record_event(self, event)

    monkeypatch.setattr(Stream, "wait_event", wait)
    monkeypatch.setattr(Stream, "record_event", record)


@pytest.mark.parametrize(
    ("plant", "held"), [(lambda _: None, 2), (record_done_early, 3)], ids=["as it is", "done before the work"]
)
def test_a_layer_that_is_done_early_is_a_third_one_on_the_card(tmp_path, monkeypatch, plant, held):
    shape = ModelConfig(6, 256, 4)
    write_random(tmp_path / "wide.pt", shape)
    with pretended() as device:
        engine = StreamedEngine(
            tmp_path / "wide.pt", torch.device("cuda"), "float16", Output((6,), ("mean",), "float32")
        )
        before = device.live_bytes
        device.reset_peaks()
        plant(monkeypatch)
        list(engine.embed([random_sequences([20])]))
        layers = (device.peak_occupied_bytes - before) / layer_bytes(shape, 2)
    assert held <= layers < held + 0.5  # the pass's own tensors


def test_memory_that_another_stream_was_recorded_for_is_taken_until_it_is_done():
    """Torch's allocator waits before it refuses: what is lost is time."""
    with pretended() as device:
        device.limit_bytes = 10_000
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            weights = torch.ones(1_000, device="cuda")
            copied = side.record_event()
        torch.cuda.current_stream().wait_event(copied)
        weights.sum()
        weights.record_stream(torch.cuda.current_stream())
        del weights
        assert torch.cuda.memory_allocated() == 0
        assert device.occupied_bytes == 4_096
        torch.ones(1_200, device="cuda")
        assert device.waits["the allocator"] == 0
        torch.ones(2_000, device="cuda")
        assert device.waits["the allocator"] == 1
        assert device.occupied_bytes == 0


def test_results_that_are_not_awaited_are_nan(weights, monkeypatch):
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    monkeypatch.setattr(Event, "elapsed_time", lambda self, end: 0.0)
    with Device().installed():
        engine = load(weights, "cuda", "float32")
        results = list(engine.embed(BATCHES))
    assert all(np.isnan(array).all() for array in rows(results).values())


def test_without_a_bug_nothing_is_caught(weights):
    embed(weights, "float16", Card(capability=TURING))


def test_pinned_memory_that_changes_before_its_copy_is_noticed():
    """As a buffer that is filled again for the next batch."""
    device = Device()
    with device.installed():
        side = torch.cuda.Stream()
        buffer = torch.zeros(4).pin_memory()
        with torch.cuda.stream(side):
            copied = buffer.to("cuda", non_blocking=True)
        buffer.fill_(1)
        with pytest.raises(OutOfOrder, match="pinned memory changed"):
            torch.cuda.synchronize()
        assert copied.device == torch.device("cuda", 0)


def test_a_copy_whose_source_is_freed_early_is_nan():
    device = Device()
    with device.installed():
        result = torch.ones(4, device="cuda")
        side, there = torch.cuda.Stream(), torch.empty(4, pin_memory=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there.copy_(result, non_blocking=True)
            done = side.record_event()
        del result
        assert there.isnan().all()
        done.synchronize()
        assert there.isnan().all()
    assert device.out_of_order == ["memory of default is freed while a side stream may use it"]


@pytest.mark.parametrize("kept", [False, True], ids=["recorded", "kept"])
def test_a_copy_out_is_there_once_it_is_awaited(kept):
    with pretended() as device:
        result = torch.ones(4, device="cuda")
        side, there = torch.cuda.Stream(), torch.empty(4, pin_memory=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there.copy_(result, non_blocking=True)
            done = side.record_event()
        if not kept:
            result.record_stream(side)
            del result
        with the_host_waits_for_results_alone(device, 1):
            done.synchronize()
        assert there.tolist() == [1.0] * 4


def test_memory_is_counted_while_a_tensor_or_a_view_of_it_lives():
    with pretended() as device:
        whole = torch.empty(1000, device="cuda")
        view = whole[10:20].view(2, 5)
        assert torch.cuda.memory_allocated() == 4096
        del whole
        assert torch.cuda.memory_allocated() == 4096
        del view
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.max_memory_allocated() == 4096
        device.limit_bytes = 4095
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1000).to("cuda")
        assert torch.cuda.memory_allocated() == 0
