"""The comparison behind a parity receipt: this engine and stored rows against fair-esm, in each type."""

import copy
import logging

import numpy as np
import torch

from lengthwise.esm2 import tensors as names
from lengthwise.esm2.accuracy import FLOAT32_SHARE, SATURATED, Reference, judge, rms
from lengthwise.esm2.devices import DTYPES, is_out_of_memory
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.reference import reference_rows
from lengthwise.esm2.status import Status
from lengthwise.ingest.digests import digest_name
from lengthwise.jobs.parity_sample import Sample
from lengthwise.store.shard import Shard

log = logging.getLogger("lengthwise")


def compare(settings: dict, engine: Engine, sample: Sample) -> dict:
    """Compare a sample.

    Parameters
    ----------
    settings
        The store's settings.
    engine
        The job's engine. In half precision its float32 twin is used too, if memory holds it.
    sample
        The sequences, and the type of the truth.

    Returns
    -------
    truth
        Its type.
    compared
        Digest and residues of each sequence.
    engine, stored
        The tensor of this engine's float32 pass, and the stored one, that is nearest to its limit or furthest beyond: `tensor`,
        `channel` (null: the typical one), `error` and `limit` as shares of that channel's spread, `share_of_limit`.
    moves, fair_esm_moves, storage_moves
        How far the run's type moves the typical channel, as a share of its spread: here, in fair-esm, and by storing alone.
    not_compared
        {what was left out: why}.

    Raises
    ------
    RuntimeError
        Memory runs out.
    """
    layers, precision, compared = settings["layers"], settings["precision"], _compared_outputs(settings)
    not_compared: dict[str, str] = {}
    if "contacts" in settings["outputs"]:
        not_compared["contacts"] = "all attention maps of fair-esm at once take too much memory"
    if not compared:
        return {"skipped": f"contacts: {not_compared['contacts']}"}

    def fair_esm(kind: str) -> dict[int | None, list[np.ndarray]] | None:
        dtype = DTYPES.get(kind, torch.float64)
        try:
            rows = reference_rows(
                engine.checkpoint, engine.device, dtype, sample.sequences, layers, "logits" in compared
            )
        except RuntimeError as error:  # torch does not compute every type on every device
            if is_out_of_memory(error):
                raise
            not_compared[f"fair-esm in {kind}"] = str(error).partition("\n")[0][:200]
            return None
        if not all(np.isfinite(each).all() for layer in rows.values() for each in layer):
            not_compared[f"fair-esm in {kind}"] = "its numbers are not finite"
            return None
        return rows

    rows = {kind: fair_esm(kind) for kind in dict.fromkeys(("float32", precision))}
    truth = rows["float32"] if sample.truth == "float32" else fair_esm(sample.truth)
    if truth is None:
        return {"skipped": "; ".join(f"{what}: {why}" for what, why in not_compared.items())}

    def references(kind: str) -> dict[int | None, Reference]:
        fair, lacking = rows[kind] or {}, FLOAT32_SHARE if kind == "float32" else 1.0
        return {
            layer: Reference.of(right, None if fair is truth else fair.get(layer), lacking)
            for layer, right in truth.items()
        }

    own, in_float32 = references(precision), references("float32")
    computed = _rows_of(engine, settings, sample)
    twin = computed if precision == "float32" else _rows_of_twin(engine, settings, sample, not_compared)
    moved = max(reference.share(reference.error) for reference in own.values()) if rows[precision] else 0.0
    if moved > SATURATED:
        not_compared["stored rows"] = f"fair-esm in {precision} moves a channel by {moved:.0%} of its spread itself"
    return {
        "truth": sample.truth,
        "compared": [
            {"digest": digest_name(Shard(path)["digests"][number].tobytes()), "residues": len(sequence)}
            for path, number, sequence in zip(sample.shards, sample.numbers, sample.sequences, strict=True)
        ],
        "engine": twin and _nearest_to_limit(twin, in_float32, "float32", "float32"),
        "stored": None
        if moved > SATURATED
        else _nearest_to_limit(_stored_rows(sample), own, precision, settings["storage_dtype"]),
        **_moves(computed, own, settings, fair_esm_ran=rows[precision] is not None and rows[precision] is not truth),
        "not_compared": not_compared,
    }


def _rows_of(engine: Engine, settings: dict, sample: Sample) -> dict[str, np.ndarray] | None:
    """{tensor: [n, D] float32} of one packed batch, not rounded for storage; None where memory does not hold it."""
    unrounded = copy.copy(engine)
    unrounded.output = Output(tuple(settings["layers"]), _compared_outputs(settings), "float32")
    (result,) = unrounded.embed([sample.sequences])
    return None if (result.status == Status.DOES_NOT_FIT).any() else _comparable(result.arrays)


def _compared_outputs(settings: dict) -> tuple[str, ...]:
    return tuple(output for output in settings["outputs"] if output != "contacts")


def _comparable(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that have rows of channels: a pseudo-perplexity is a function of logits."""
    return {name: array for name, array in arrays.items() if name not in (names.PERPLEXITY, "contacts")}


def _rows_of_twin(
    engine: Engine, settings: dict, sample: Sample, not_compared: dict[str, str]
) -> dict[str, np.ndarray] | None:
    """`_rows_of` the same engine in float32: the code of the layers is the same in every type."""
    rows = None
    try:
        rows = _rows_of(engine.in_float32(), settings, sample)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if rows is None:
        not_compared["this engine in float32"] = "it does not fit into the device's memory"
    return rows


def _stored_rows(sample: Sample) -> dict[str, np.ndarray]:
    """{tensor: [n, D]} as they are in the shards."""
    found: dict[str, list[np.ndarray]] = {}
    for path, number in zip(sample.shards, sample.numbers, strict=True):
        shard = Shard(path)
        for name in shard.data_names:
            found.setdefault(name, []).append(np.asarray(shard[name][shard.entries(name, number)]))
    return _comparable({name: np.concatenate(parts) for name, parts in found.items()})


def _nearest_to_limit(
    tensors: dict[str, np.ndarray], references: dict[int | None, Reference], computed: str, stored: str
) -> dict:
    """The verdict on the tensor that uses most of its limit."""
    found = []
    for name, rows in tensors.items():
        output, layer = names.split(name)
        reference = references[layer]
        verdict = judge(
            rows, reference.right(output), reference, computed, stored if names.by_residue(name) else "float32"
        )
        found.append({"tensor": name, **vars(verdict)})
    return max(found, key=lambda each: each["share_of_limit"])


def _moves(
    computed: dict[str, np.ndarray] | None, references: dict[int | None, Reference], settings: dict, fair_esm_ran: bool
) -> dict[str, float | None]:
    """How far rounding moves the typical channel of the tensor that it moves most."""
    moves, fair_esm, storage = [0.0], [0.0], [0.0]
    dtype = DTYPES[settings["storage_dtype"]]
    for name, rows in (computed or {}).items():
        output, layer = names.split(name)
        reference = references[layer]
        moves.append(reference.share(rms(rows - reference.right(output))))
        fair_esm.append(reference.share(reference.error))
        if names.by_residue(name):
            storage.append(reference.share(rms(torch.from_numpy(rows).to(dtype).float().numpy() - rows)))
    return {
        "moves": max(moves) if computed and np.isfinite(moves).all() else None,
        "fair_esm_moves": max(fair_esm) if fair_esm_ran else None,
        "storage_moves": max(storage) if np.isfinite(storage).all() else None,
    }
