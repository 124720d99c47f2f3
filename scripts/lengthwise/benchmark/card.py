"""What a GPU says of itself: name, driver, clocks, power. nvidia-smi answers, which is there wherever the driver is."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from lengthwise.esm2.devices import device_name

_FACTS = {
    "driver": "driver_version",
    "most_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.max.mem",
    "watts": "power.limit",
}
_NOW = {"clock_mhz": "clocks.sm", "watts": "power.draw"}


def description(device: torch.device) -> str:
    """The device, and of a GPU its memory, driver and limits, in words."""
    if device.type == "cpu":
        return f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    facts = _answer(_query(device, _FACTS), _FACTS)
    said = {name: facts.get(name, "?") for name in _FACTS}
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    return (
        f"{device_name(device)} of {memory:.1f} GB, driver {said['driver']}, CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, at most {said['most_mhz']} MHz (memory {said['memory_mhz']} MHz) and {said['watts']} W"
    )


@contextmanager
def sampled(device: torch.device) -> Iterator[dict[str, float]]:
    """A GPU's clock in MHz and its power in W while the block runs; empty on a CPU, or where it does not tell."""
    found: dict[str, float] = {}
    query = _query(device, _NOW) if device.type == "cuda" else None
    try:
        yield found
    finally:
        for name, value in _answer(query, _NOW).items():
            with suppress(ValueError):  # N/A
                found[name] = float(value)


def _query(device: torch.device, fields: dict[str, str]) -> "subprocess.Popen[str] | None":
    """nvidia-smi, asked and not awaited: it answers while the GPU works."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # not an index: it ignores CUDA_VISIBLE_DEVICES
    command = [
        "nvidia-smi",
        f"--id={uuid}",
        f"--query-gpu={','.join(fields.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def _answer(query: "subprocess.Popen[str] | None", fields: dict[str, str]) -> dict[str, str]:
    """{name: value}, without what this GPU does not report."""
    if query is None:
        return {}
    said = query.communicate()[0]
    if query.returncode != 0:
        return {}
    values = (value.strip() for value in said.split(","))
    return {name: value for name, value in zip(fields, values, strict=False) if not value.startswith("[")}  # [N/A]
