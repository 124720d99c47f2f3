"""Parity: compare a few stored sequences with fair-esm in float32; the result is the parity receipt."""

import gc
import hashlib
import json
import logging
import math
import re
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.checkpoint import reference_model
from lengthwise.esm2.costs import forecast_seconds
from lengthwise.esm2.status import Status
from lengthwise.ingest.digests import digest_name
from lengthwise.store.paths import shard_path
from lengthwise.store.settings import shape_of
from lengthwise.store.shard import Shard
from lengthwise.system.files import read_json, write_json
from lengthwise.system.machine import host_available

if TYPE_CHECKING:
    from lengthwise.plan.work_orders import PlannedShard

log = logging.getLogger("lengthwise")
# Float32 sums in another order differ by this share of the layer's RMS, of 1 or of the value, whichever is largest.
FLOAT32_TOLERANCE = 2e-5
# Half a unit in the last place of float16: relative, and absolute near zero.
FLOAT16_ROUNDING, FLOAT16_SMALLEST = 2.0**-11, 2.0**-25
# Smallest allowed cosine between a row in half precision and fair-esm's.
MIN_COSINE = {"float16": 0.9999, "bfloat16": 0.999}
# Limits of a compared sequence: residues (ESM-2's training length) and forecast seconds.
MAX_RESIDUES, MAX_SECONDS = 1022, 2.0


class ParityError(LengthwiseError):
    """Stored rows differ from fair-esm's by more than the bound."""


def receipt(
    store: Path, settings: dict, checkpoint: Path, device: torch.device, maker: dict, shards: "list[PlannedShard]"
) -> dict:
    """The parity receipt of this device and these versions, made once per store and then read back.

    Compares all stored tensors of three sequences: the shortest, the middle and the longest that are short enough.

    Parameters
    ----------
    store, settings
        The store and its settings.
    checkpoint
        Its weights.
    device
        Where the reference runs: the engine's.
    maker
        The device's name and the versions; each combination has its own receipt.
    shards
        Finished shards, of ascending lengths.

    Returns
    -------
    The receipt. Where nothing can be compared, `skipped` says why, and no file is written: the next job tries again.

    Raises
    ------
    ParityError
        An error is above the bound.
    """
    path = _path(store, maker)
    with suppress(FileNotFoundError, LengthwiseError):  # a damaged one is made again
        return read_json(path, "parity")["parity"]
    chosen = _choose(store, settings, shards)
    if not chosen:
        return {"skipped": "the job had no sequence that is short enough"}
    if lack := _lack_of_memory(settings, max(len(sequence) for *_, sequence in chosen), device):
        log.info("not compared with fair-esm: %s", lack)
        return {"skipped": lack}
    began = perf_counter()
    compared = _compare(reference_model(checkpoint, device), settings, chosen)
    result = {
        "bound": bound(settings["precision"]),
        "max_error_over_rms": max(each["max_error_over_rms"] for each in compared),
        "min_cosine": min(each["min_cosine"] for each in compared),
        "share_of_bound": max(each["share_of_bound"] for each in compared),
        "compared": compared,
        "seconds": round(perf_counter() - began, 3),
    }
    log.info(
        "compared %d stored sequences with fair-esm in %.1f s: largest error %.1e of a layer's RMS, smallest cosine %.7f",
        len(compared),
        result["seconds"],
        result["max_error_over_rms"],
        result["min_cosine"],
    )
    write_json(path, {**maker, "parity": result})
    return result


def bound(precision: str) -> str:
    """The bound of an error, in words."""
    if precision == "float32":
        return f"error at most {FLOAT32_TOLERANCE:g} of the layer's RMS (of 1 or of the value, if more), plus storage rounding"
    return f"cosine of each row at least {MIN_COSINE[precision]}"


def _path(store: Path, maker: dict) -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "_", maker["device"])[:60].strip("_")
    return (
        store / "parity" / f"{name}-{hashlib.sha256(json.dumps(maker, sort_keys=True).encode()).hexdigest()[:8]}.json"
    )


def _choose(store: Path, settings: dict, shards: "list[PlannedShard]") -> list[tuple[Shard, int, bytes]]:
    """(shard, number in it, residues) of the shortest, the middle and the longest sequence that may be compared."""
    opened = [Shard(shard_path(store, shard.name)) for shard in shards]
    status = np.concatenate([shard["status"] for shard in opened])
    lengths = np.concatenate([shard.lengths for shard in shards])
    starts = np.cumsum([0, *(len(shard.lengths) for shard in shards)])
    quick = forecast_seconds(lengths, shape_of(settings), settings["device"]) <= MAX_SECONDS
    known = np.array([sequence != b"" for shard in shards for sequence in shard.sequences])
    fit = np.flatnonzero((status == Status.GOOD) & (lengths <= MAX_RESIDUES) & quick & known)
    chosen = []
    for place in np.unique(fit[[0, len(fit) // 2, -1]]) if len(fit) else ():
        i = int(np.searchsorted(starts, place, side="right")) - 1
        number = int(place - starts[i])
        chosen.append((opened[i], number, shards[i].sequences[number]))
    return chosen


def _lack_of_memory(settings: dict, residues: int, device: torch.device) -> str | None:
    """Why fair-esm does not fit into the device's free memory; None if it fits."""
    weights = 12 * settings["num_layers"] * settings["embed_dim"] ** 2
    attention = 3 * settings["attention_heads"] * (residues + 2) ** 2  # scores, and softmax's input and output
    needed = 4 * (weights + attention)
    if device.type == "cuda":
        gc.collect()  # frees the engine's memory
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = host_available()
    if needed > free:
        return f"fair-esm needs {needed / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB were free on the device"
    return None


@torch.inference_mode()
def _compare(model: Any, settings: dict, chosen: list[tuple[Shard, int, bytes]]) -> list[dict]:
    convert, device = model.alphabet.get_batch_converter(), model.embed_tokens.weight.device
    found = []
    for shard, number, sequence in chosen:
        _, _, tokens = convert([("", sequence.decode())])  # [1, L + 2]
        hidden = model(tokens.to(device), repr_layers=settings["layers"])["representations"]
        expected = {layer: rows[0].cpu().numpy() for layer, rows in hidden.items()}  # [L + 2, D]
        found.append(_judge(shard, number, expected, settings["precision"]))
    return found


def _judge(shard: Shard, number: int, expected: dict[int, np.ndarray], precision: str) -> dict:
    """The errors of one sequence over all its stored tensors."""
    start, stop = shard["offsets"][number : number + 2].tolist()
    errors, cosines, shares = [], [], []
    for name in shard.data_names:
        kind, layer = name.split("_")
        rows = expected[int(layer)]
        right = {"layer": rows[1:-1], "mean": rows[1:-1].mean(0, keepdims=True), "bos": rows[:1]}[kind]
        stored = shard[name][start:stop] if kind == "layer" else shard[name][number : number + 1]
        rms = math.sqrt(np.mean(rows[1:-1] ** 2))
        error = np.abs(stored.astype(np.float32) - right)
        cosine = _cosines(stored.astype(np.float64), right.astype(np.float64))
        errors.append(float(error.max() / rms))
        cosines.append(float(cosine.min()))
        allowed = FLOAT32_TOLERANCE * np.maximum(max(1.0, rms), np.abs(right))
        if stored.dtype == np.float16:
            allowed += FLOAT16_ROUNDING * np.abs(right) + FLOAT16_SMALLEST
        share = error / allowed if precision == "float32" else (1 - cosine) / (1 - MIN_COSINE[precision])
        shares.append(float(share.max()))
        if not shares[-1] <= 1:  # true for NaN
            raise ParityError(
                f"{shard.path}: {name} of sequence number {number} ({stop - start} residues) is not what fair-esm computes: "
                f"largest error {errors[-1]:.2g} of the layer's RMS, smallest cosine {cosines[-1]:.6f}; the bound is: "
                f"{bound(precision)}"
            )
    return {
        "digest": digest_name(shard["digests"][number].tobytes()),
        "residues": stop - start,
        "max_error_over_rms": float(f"{max(errors):.3g}"),
        "min_cosine": round(min(cosines), 9),
        "share_of_bound": float(f"{max(0.0, *shares):.3g}"),
    }


def _cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Row by row: [n] of two arrays [n, D]."""
    return (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
