"""How fast a device is clocked and how warm it is, where that can be read."""

import statistics
import subprocess
from pathlib import Path

import torch


def clock_and_temperature(device: torch.device) -> tuple[float | None, float | None]:
    """MHz and degrees Celsius now; None where a device or its driver does not say."""
    return _of_gpu(device) if device.type == "cuda" else _of_cpu()


def _of_gpu(device: torch.device) -> tuple[float | None, float | None]:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", "--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        clock, temperature = said.split(",")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, None
    return _number(clock), _number(temperature)


def _of_cpu(root: Path = Path("/")) -> tuple[float | None, float | None]:
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    clocks = [_number(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    clock = round(statistics.fmean(clocks), 1) if clocks else None
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        try:
            if (zone / "type").read_text().strip() in ("x86_pkg_temp", "cpu-thermal", "cpu_thermal"):
                return clock, int((zone / "temp").read_text()) / 1000
        except (OSError, ValueError):
            continue
    return clock, None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
