"""Limits of a process on its memory (ulimit): auto streams; a sound checkpoint that it cannot map is not called damaged."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import hugging_face
from lengthwise.esm2.checkpoint import write_random
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.system.limits import process_memory_limits
from lengthwise.system.machine import host_available

SHAPE = ModelConfig(60, 240, 20)  # 167 MB in float32

LIMITED = """
import resource, sys, psutil, torch
from pathlib import Path
from lengthwise.errors import LengthwiseError
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.streamed import open_engine

torch.set_num_threads(1)
name, path, more = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
used = psutil.Process().memory_info()
used = used.vms if name == "RLIMIT_AS" else used.data
resource.setrlimit(getattr(resource, name), (used + more, resource.RLIM_INFINITY))
try:
    engine = open_engine(path, torch.device("cpu"), "float32", Output((60,), ("mean",), "float32"))
except LengthwiseError as error:
    sys.exit(str(error))
for result in engine.embed([[b"MKTAYIAKQR" * 10]] * 2):
    assert (result.status == 0).all()
print(type(engine).__name__)
"""


def limited(name: str, path: Path, more: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED, name, str(path), str(more)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sixty_layers.pt"
    write_random(path, SHAPE)
    return path


def test_auto_streams_where_the_process_may_map_the_weights_but_not_hold_them_too(weights):
    done = limited("RLIMIT_DATA", weights, int(1.7 * weights.stat().st_size))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "StreamedEngine"


@pytest.mark.parametrize(("name", "option"), [("RLIMIT_DATA", "ulimit -d"), ("RLIMIT_AS", "ulimit -v")])
@pytest.mark.parametrize("layout", ["fair-esm", "transformers"])
def test_a_checkpoint_that_cannot_be_mapped_is_not_called_damaged(tmp_path, weights, layout, name, option):
    path = file = weights
    if layout == "transformers":
        path = hugging_face.write(tmp_path / "sixty_layers", SHAPE)
        file = path / "model.safetensors"
    done = limited(name, path, file.stat().st_size // 2)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr[-2000:]
    assert re.match(rf"{file}: no memory to map its 1\d\d MB \({option} allows .+ are in use\); ", done.stderr)
    assert done.stderr.endswith(f"raise the limit ({option} unlimited)\n")


@pytest.mark.parametrize(("name", "option"), [("RLIMIT_DATA", "ulimit -d"), ("RLIMIT_AS", "ulimit -v")])
def test_what_is_free_is_what_the_process_may_take(name, option):
    kind, used = getattr(resource, name), psutil.Process().memory_info()
    used_bytes = used.vms if name == "RLIMIT_AS" else used.data
    limits = resource.getrlimit(kind)
    assert option not in [found for found, *_ in process_memory_limits()]
    resource.setrlimit(kind, (used_bytes + (100 << 20), limits[1]))
    try:
        assert (option, used_bytes + (100 << 20)) in [found[:2] for found in process_memory_limits()]
        assert 0 < host_available() < 110 << 20
        resource.setrlimit(kind, (1 << 20, limits[1]))
        assert host_available() == 0
    finally:
        resource.setrlimit(kind, limits)
