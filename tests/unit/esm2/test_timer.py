"""How long a GPU may have waited for launches, on a card that keeps its time by a scripted clock."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lengthwise.esm2 import passes

CUDA = torch.device("cuda")


class Card:
    """A GPU's stream: work begins when it is launched and the work before it is done."""

    def __init__(self, monkeypatch):
        self.host_seconds = self.done_at = self.idle_seconds = 0.0
        card = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(card.done_at, card.host_seconds)

            def query(self):
                return self.at <= card.host_seconds

            def elapsed_time(self, end):
                return (end.at - self.at) * 1000

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(passes, "time", SimpleNamespace(perf_counter=lambda: self.host_seconds))

    def run(self, launch_seconds: float, kernel_seconds: float) -> None:
        self.host_seconds += launch_seconds
        self.idle_seconds += max(0.0, self.host_seconds - self.done_at)
        self.done_at = max(self.done_at, self.host_seconds) + kernel_seconds

    def batch(self, launch_seconds, kernel_seconds) -> passes.Timer:
        """A pass of many kernels; `idle_seconds` is what the card idled meanwhile."""
        self.idle_seconds, self.done_at = 0.0, max(self.done_at, self.host_seconds)
        timer = passes.Timer(CUDA)
        for launch, kernel in np.broadcast(launch_seconds, kernel_seconds):
            self.run(launch, kernel)
        timer.stop()
        return timer


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def test_a_launch_bound_gpu_is_not_busy(card):
    """Kernels of 3 us behind launches of 10 us: by its own clock the card was at work all the time."""
    timer = card.batch([10e-6] * 100, [3e-6] * 100)
    assert timer.elapsed_ms() == pytest.approx(1.003)
    assert timer.wait_launch_ms() == pytest.approx(1.0)


def test_a_gpu_with_its_work_queued_waits_for_no_launch(card):
    card.run(10e-6, 5e-3)  # the batch before
    timer = card.batch([10e-6] * 100, [50e-6] * 100)
    assert timer.elapsed_ms() == pytest.approx(5.0)
    assert timer.wait_launch_ms() == 0


def test_the_first_batch_waits_at_most_for_its_own_launches(card):
    timer = card.batch([10e-6] * 100, [50e-6] * 100)
    assert timer.elapsed_ms() == pytest.approx(5.01)
    assert timer.wait_launch_ms() == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_wait_is_never_less_than_what_the_gpu_idled(card, seed):
    rng = np.random.default_rng(seed)
    for launch_us, kernel_us in rng.choice([2, 10, 50], (10, 2)):
        timer = card.batch(rng.exponential(launch_us * 1e-6, 50), rng.exponential(kernel_us * 1e-6, 50))
        assert card.idle_seconds * 1000 <= timer.wait_launch_ms() + 1e-9
        assert timer.wait_launch_ms() <= timer.elapsed_ms()
