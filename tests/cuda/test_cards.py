"""Cards and builds of torch that people have: each ends in a run or in one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend import WHEEL, Card
from rehearsal import BATCHES, VOLTA, embed, load, pretended, random_sequences, rms, rows

import driver
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.devices import DTYPES, is_out_of_memory, resolve_device
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.status import Status
from lengthwise.system import gpus

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CUDA_12_6 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
V100 = Card("Tesla V100-SXM2-16GB", VOLTA, 16 << 30)
CARDS = {
    "T4": Card("Tesla T4", (7, 5), 15 << 30),
    "V100, CUDA 12.6": Card("Tesla V100-SXM2-16GB", VOLTA, 16 << 30, CUDA_12_6, cuda="12.6"),
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0)),
    "8 GB": Card("NVIDIA GeForce RTX 4060", (8, 9), 8 << 30),
    "Blackwell": Card("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30),
    "Blackwell, workstation": Card("NVIDIA GB10", (12, 1)),
    "newer than torch": Card("NVIDIA Next", (13, 0)),
    "no flash": Card(flash=False),
    "no compiler": Card(compiler=False),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    checkpoint.write_random(path, ModelConfig(2, 32, 2))
    return path


@pytest.fixture(scope="module")
def exact(weights):
    return rows(list(load(weights, "cpu", "float32").embed(BATCHES)))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("card", CARDS)
def test_a_card_runs_in_every_type(weights, exact, card, precision):
    card = CARDS[card]
    with pretended(card):
        assert resolve_device("cuda") == torch.device("cuda")
    found = rows(embed(weights, precision, card, compile=True))
    for name, right in exact.items():
        assert rms(found[name] - right) <= 16 * torch.finfo(DTYPES[precision]).eps * rms(right)


def test_a_card_that_torch_was_not_built_for_is_one_line(small_store, random_proteins, refused):
    store = small_store(device="cuda")
    store.ingest("a", random_proteins(3))
    (job,) = store.plan()["job"]
    with pretended(V100), refused("device: cuda", "Tesla V100-SXM2-16GB", "sm_70", "sm_75", "docs/install.md"):
        store.embed(job)


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 6), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("compute_80",), True),
        ((9, 0), ("sm_80", "sm_90a"), True),
        ((10, 3), WHEEL, True),
        ((11, 0), WHEEL, False),
        ((12, 0), CUDA_12_6, False),
    ],
)
def test_code_runs_within_a_generation_and_what_is_compiled_at_load_on_every_later_card(
    capability, built_for, runs, refused
):
    with pretended(Card(capability=capability, arch_list=built_for)):
        if runs:
            resolve_device("cuda")
        else:
            with refused(f"sm_{capability[0]}{capability[1]}", *built_for):
                resolve_device("cuda")


def test_a_cpu_build_is_one_line(small_store, random_proteins, refused):
    store = small_store(device="cuda")
    store.ingest("a", random_proteins(3))
    (job,) = store.plan()["job"]
    with pretended(Card(cuda=None)), refused("device: cuda", "this torch is a CPU build", "docs/install.md"):
        store.embed(job)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs code in a Python of a machine with three GPUs, with more of the environment; returns its output."""
    libcuda = driver.build(tmp_path_factory.mktemp("driver"))

    def start(code: str, **environment: str) -> str:
        given = {name: value for name, value in os.environ.items() if name not in gpus.ALLOCATOR_SETTINGS}
        environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(SCRIPTS)])
        given |= {"LD_LIBRARY_PATH": str(libcuda), "CUDA_VISIBLE_DEVICES": "0"} | environment
        return subprocess.run(
            [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
        ).stdout

    return start


ASK = """
from lengthwise.system import gpus
print(gpus.auto_device(on_cluster=False))
try:
    gpus.refuse_missing_gpu()
except gpus.LengthwiseError as error:
    print(error)
"""


@pytest.mark.parametrize(("version", "cuda"), [("2.13.0", None), ("2.13.0+cpu", None), ("2.13.0", "13.0")])
def test_auto_takes_cuda_where_torch_has_it_whatever_its_version_is_called(run, tmp_path, version, cuda):
    """conda's CPU builds have no +cpu, and its CUDA builds no +cu130."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('it takes seconds to import')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__, cuda = {version!r}, {cuda!r}")
    device, *lines = run(ASK, PYTHONPATH=str(tmp_path)).splitlines()
    if cuda:
        assert (device, lines) == ("cuda", [])
    else:
        assert device == "cpu"
        assert lines == [
            f"device: cuda, but torch {version} is a CPU build; docs/install.md says how to install another"
        ]


LEASE = """
from lengthwise.system.gpus import leased
with leased("cuda"):
    import torch
    print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
)
def test_torch_gets_the_allocators_settings_unless_a_user_gives_others(run, given, expected):
    assert run(LEASE, **given).strip() == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
    ],
)
def test_what_is_out_of_memory(message, expected):
    assert is_out_of_memory(RuntimeError(message)) == expected


def test_without_a_compiler_there_is_one_line_and_nothing_else_changes(weights, caplog):
    caplog.set_level("INFO", "lengthwise")
    embed(weights, "float16", CARDS["no compiler"], compile=True)
    (line,) = (record.getMessage() for record in caplog.records if "uncompiled" in record.getMessage())
    assert "C compiler" in line
    assert "\n" not in line


def test_a_model_that_a_card_does_not_hold_is_out_of_memory_and_no_other_error(weights):
    with pretended(Card("NVIDIA GeForce GT 710", (7, 5), 401 << 20)) as device:
        device.limit_bytes = 50_000
        with pytest.raises(torch.OutOfMemoryError):
            load(weights, "cuda", "float32")
        assert device.live_bytes == 0


def test_a_small_card_embeds_what_fits_and_says_what_does_not(weights, caplog):
    with pretended(CARDS["8 GB"]) as device:
        engine = load(weights, "cuda", "float16")
        device.limit_bytes = device.live_bytes + 1_500 * engine.bytes_per_token
        tokens = engine.auto_batch_tokens()
        short, long = random_sequences([100] * (tokens // 102)), random_sequences([4_000])
        first, second = engine.embed([short, long])
    assert (first.status == Status.GOOD).all()
    assert np.isfinite(first.arrays["layer_2"]).all()
    assert second.status.tolist() == [Status.DOES_NOT_FIT]
    assert "NVIDIA GeForce RTX 4060" in caplog.text
