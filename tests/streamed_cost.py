"""What streamed weights cost beside resident ones on this CPU: nine batches of six proteins of 300 residues, in float32.

``python tests/streamed_cost.py esm2_t33_650M_UR50D`` prints peak resident memory, processor time of the passes and
time of loading, and the tokens of each wave. Each of the two is a process of its own.
"""

import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lengthwise.benchmark.weights import write_weights
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.shapes import MODELS
from lengthwise.esm2.streamed import open_engine

PROTEIN = b"MKTAYIAKQR" * 30
BATCHES = [[PROTEIN] * 6] * 9
THREADS = 2


def measure(weights: Path, residency: str, layers: int) -> None:
    """Embed the batches and print what it took."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # the engine says each wave
    torch.set_num_threads(THREADS)
    began = time.monotonic()
    output = Output((layers,), ("mean",), "float32")
    engine = open_engine(weights, torch.device("cpu"), "float32", output, residency=residency)
    loading, began = time.monotonic() - began, time.process_time()
    for result in engine.embed(BATCHES):
        assert (result.status == 0).all()
    passes = time.process_time() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak_bytes = int(status["VmHWM"].split()[0]) * 1024
    print(
        f"{residency:9} {peak_bytes / 1e9:5.2f} GB, passes {passes:4.0f} s of processor time, loading {loading:3.0f} s"
    )


def main(model: str) -> None:
    """Write random weights of the model's shape, and measure both orders."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        write_weights(weights, MODELS[model])
        for residency in ("streamed", "resident"):
            run = [sys.executable, __file__, str(weights), residency, str(MODELS[model].num_layers)]
            subprocess.run(run, check=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    elif len(sys.argv) == 2 and sys.argv[1] in MODELS:
        main(sys.argv[1])
    else:
        sys.exit(__doc__)
