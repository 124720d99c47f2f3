"""esm-cpp, in a process of its own: its numpy is older than the other engines'."""

import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lengthwise.benchmark.peers import Embed, Part, hugging_face_tensors
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.tokens import tokenize

_REQUIREMENTS = Path(__file__).with_name("esm_cpp_requirements.txt")
_WORKER = Path(__file__).with_name("esm_cpp_worker.py")


def python_of(environment: Path) -> Path:
    """The Python of a virtual environment. (esm-cpp has no builds for Windows.)"""
    return environment / "bin" / "python"


def how_to_install(environment: Path) -> str:
    """The shell's line that makes the environment."""
    python, folder, requirements = (shlex.quote(str(each)) for each in (sys.executable, environment, _REQUIREMENTS))
    return f"{python} -m venv {folder} && {folder}/bin/pip install -r {requirements}"


class _Process:
    """A worker in esm-cpp's environment; it ends when this object is gone, or this process."""

    def __init__(self, environment: Path):
        self.connection, theirs = multiprocessing.Pipe()
        # -I: neither PYTHONPATH nor this folder, whose modules belong to another Python.
        command = [str(python_of(environment)), "-I", str(_WORKER), str(theirs.fileno())]
        variables = os.environ | {"ESM_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=variables)
        theirs.close()

    def ask(self, name: str, *given: object) -> Any:
        """The answer to a request.

        Raises
        ------
        RuntimeError
            The worker failed, or has ended.
        """
        try:
            self.connection.send((name, *given))
            error, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"esm-cpp's process ended with exit code {self.process.wait()}") from None
        if error:
            raise RuntimeError(error)
        return value

    def __del__(self) -> None:
        self.connection.close()
        self.process.wait()


def load(weights: Path, config: ModelConfig, environment: Path, folder: Path) -> Embed:
    """esm-cpp's packed scheduler. It returns logits alone, so the first call, whose rows are compared, reads hidden states.

    Parameters
    ----------
    weights
        A fair-esm checkpoint.
    config
        Its shape.
    environment
        A virtual environment with esm-cpp.
    folder
        The weights are written there for it, and removed.
    """
    from safetensors.torch import save_file

    worker = _Process(environment)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        converted = Path(temporary) / "model.safetensors"
        save_file(_tensors(weights), converted)
        worker.ask("load", str(converted))
    is_first_call = True

    def embed(sequences: list[bytes]) -> Iterator[Part]:
        worker.ask("take", [tokenize(sequence).astype(np.int32).tobytes() for sequence in sequences])

        def parts() -> Iterator[Part]:
            nonlocal is_first_call
            if is_first_call:
                is_first_call = False
                rows = [np.frombuffer(row, np.float32) for row in worker.ask("rows")]
                yield Part([row.reshape(-1, config.embed_dim) for row in rows])
            else:
                worker.ask("embed")

        return parts()

    return embed


def _tensors(weights: Path) -> dict[str, torch.Tensor]:
    """The whole model, under the names that esm-cpp reads."""
    state = checkpoint.read(weights)[1]
    tensors = {f"esm.{name}": tensor for name, tensor in hugging_face_tensors(weights).items()}
    tensors |= {
        name: tensor for name, tensor in state.items() if name.startswith("lm_head.") and name != "lm_head.weight"
    }
    tensors["lm_head.decoder.weight"] = state["lm_head.weight"]
    return {name: tensor.clone() for name, tensor in tensors.items()}
