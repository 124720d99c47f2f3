"""What streamed weights take of memory, by the kernel's account: pages of the checkpoint go once their layer is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

import hugging_face
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.shapes import ModelConfig

SHAPE = ModelConfig(20, 512, 8)
FILE_BYTES = 4 * SHAPE.parameters  # 250 MB
# Prints the bytes by which embedding two proteins raises the largest resident memory; writing 5 forgets the peak before.
EMBED = """
import sys
from pathlib import Path

import torch

from lengthwise.esm2.outputs import Output
from lengthwise.esm2.streamed import StreamedEngine


def kilobytes(name):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0])


torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmHWM")
engine = StreamedEngine(Path(sys.argv[1]), torch.device("cpu"), "float32", Output((20,), ("mean",), "float32"))
results = list(engine.embed([[b"MKTAYIAKQR"], [b"MKTAYIAKQRQISFVKSHFSRQ"]]))
assert all((result.status == 0).all() for result in results)
print(1024 * (kilobytes("VmHWM") - before))
"""


def peak_bytes(weights: Path) -> int:
    run = subprocess.run([sys.executable, "-c", EMBED, weights], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's account of a process is Linux's")
@pytest.mark.parametrize("layout", ["fair-esm", "transformers"])
def test_streamed_weights_take_the_memory_of_a_few_layers_not_of_the_file(tmp_path, layout):
    if layout == "fair-esm":
        weights = tmp_path / "weights.pt"
        write_random(weights, SHAPE)
        file = weights
    else:
        weights = hugging_face.write(tmp_path / "weights", SHAPE, vocabulary=False)
        file = weights / "model.safetensors"
    assert file.stat().st_size > 0.95 * FILE_BYTES
    taken = peak_bytes(weights)
    print(f"{layout}: {taken / 1e6:.0f} MB of {FILE_BYTES / 1e6:.0f}")
    assert (
        taken < 0.6 * FILE_BYTES
    )  # torch 2.6 and safetensors 0.5 take 0.48, newer ones less; all layers at once more than 1
