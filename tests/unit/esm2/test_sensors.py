"""What a device says of itself, with stand-ins for NVML and for psutil."""

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from lengthwise.esm2 import meters

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Nvml:
    """A stand-in for pynvml with one GPU, `GPU-1-2-3`, that has these numbers and no others."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, **numbers):
        self.numbers, self.started = numbers, False

    def nvmlInit(self):  # noqa: N802
        self.started = "library" not in self.numbers
        self._require(self.started)

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self._require(self.started and uuid == "GPU-1-2-3")
        return uuid

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        self._require(kind == self.NVML_CLOCK_SM and "clock" in self.numbers)
        return self.numbers["clock"]

    def nvmlDeviceGetTemperature(self, handle, kind):  # noqa: N802
        self._require(kind == self.NVML_TEMPERATURE_GPU and "temperature" in self.numbers)
        return self.numbers["temperature"]

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        self._require(self.started and "driver" in self.numbers)
        return self.numbers["driver"]

    def _require(self, fine):
        if not fine:
            raise self.NVMLError


@pytest.fixture
def nvml(monkeypatch):
    """Put a stand-in in the place of pynvml; None: it is not installed."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3"))
    return lambda module: monkeypatch.setitem(sys.modules, "pynvml", module)


def test_a_gpu_says_its_clock_and_temperature(nvml):
    nvml(Nvml(clock=1755, temperature=61))
    assert meters.clock_and_temperature(GPU) == (1755, 61)


def test_a_number_that_a_gpu_does_not_have_is_none_and_the_other_is_there(nvml):
    nvml(Nvml(temperature=61))
    assert meters.clock_and_temperature(GPU) == (None, 61)
    nvml(Nvml(clock=1755))
    assert meters.clock_and_temperature(GPU) == (1755, None)


def test_a_gpu_that_nvml_does_not_know_says_nothing(nvml, monkeypatch):
    nvml(Nvml(clock=1755, temperature=61))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="4-5-6"))
    assert meters.clock_and_temperature(GPU) == (None, None)


def test_the_drivers_version_is_what_nvml_says(nvml):
    nvml(Nvml(driver="580.105.08"))
    assert meters.driver_version() == "580.105.08"
    nvml(Nvml())
    assert meters.driver_version() is None


@pytest.mark.parametrize("module", [None, Nvml(library=None, clock=1755, temperature=61, driver="580.105.08")])
def test_a_machine_without_the_module_or_without_a_driver_says_nothing(nvml, module):
    nvml(module)
    assert meters.clock_and_temperature(GPU) == (None, None)
    assert meters.driver_version() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="expects a machine without a GPU")
def test_the_real_module_without_a_driver_says_nothing():
    pytest.importorskip("pynvml")
    assert meters.driver_version() is None


def test_a_cpus_temperature_is_its_packages(monkeypatch):
    def temperatures(**found):
        monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
        return meters.clock_and_temperature(CPU)[1]

    package, core, disk = (SimpleNamespace(current=celsius) for celsius in (54.5, 51.0, 38.0))
    assert temperatures(nvme=[disk], coretemp=[package, core]) == 54.5
    assert temperatures(k10temp=[package]) == 54.5
    assert temperatures(nvme=[disk]) is None
    assert temperatures() is None
    monkeypatch.delattr(psutil, "sensors_temperatures")
    assert meters.clock_and_temperature(CPU)[1] is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [(SimpleNamespace(current=2500.04), 2500.0), (SimpleNamespace(current=0.0), None), (None, None)],
)
def test_a_cpus_clock_is_never_zero(monkeypatch, found, expected):
    monkeypatch.setattr(psutil, "cpu_freq", lambda: found)
    assert meters.clock_and_temperature(CPU)[0] == expected


@pytest.mark.parametrize("error", [FileNotFoundError, NotImplementedError])
def test_a_machine_that_hides_its_clock_says_nothing(monkeypatch, error):
    def hidden():
        raise error

    monkeypatch.setattr(psutil, "cpu_freq", hidden)
    assert meters.clock_and_temperature(CPU)[0] is None
