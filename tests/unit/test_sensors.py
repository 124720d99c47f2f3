from types import SimpleNamespace

import pytest
import torch

from lengthwise import sensors


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi that prints what it is told, for the GPU that it is asked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3"))

    def says(line):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f'#!/bin/sh\nfor word in "$@"; do [ "$word" = --id=GPU-1-2-3 ] && echo "{line}"; done\nexit 0\n'
        )
        program.chmod(0o755)
        return sensors.clock_and_temperature(torch.device("cuda"))

    return says


def test_a_gpu_says_its_clock_and_temperature(smi):
    assert smi("1755, 61") == (1755.0, 61.0)


def test_what_a_gpu_does_not_say_is_none(smi):
    assert smi("[N/A], 61") == (None, 61.0)
    assert smi("no devices were found") == (None, None)


def test_a_machine_without_nvidia_smi_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2-3"))
    assert sensors.clock_and_temperature(torch.device("cuda")) == (None, None)


def test_a_cpus_clock_is_the_mean_of_its_cores_and_its_temperature_the_packages(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\ncpu MHz\t\t: 2000.0\nprocessor : 1\ncpu MHz\t\t: 3000.0\n")
    assert sensors._of_cpu(tmp_path) == (2500.0, None)
    for number, (kind, millidegrees) in enumerate((("acpitz", 20_000), ("x86_pkg_temp", 54_500))):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(f"{kind}\n")
        (zone / "temp").write_text(f"{millidegrees}\n")
    assert sensors._of_cpu(tmp_path) == (2500.0, 54.5)
    assert sensors._of_cpu(tmp_path / "nothing") == (None, None)
