"""Outputs: which hidden representations are kept, how they are pooled, and whether their numbers are finite.

Shapes: T tokens of a batch, R residues, N sequences, D width, P pairs of residues (`lengthwise.esm2.tensors`).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lengthwise.esm2 import tensors
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.model import Packing
from lengthwise.esm2.status import Status
from lengthwise.esm2.tokens import VOCABULARY_SIZE

# Residues that a GPU reduces one after another.
RESIDUES_PER_PART = 128


@dataclass(frozen=True)
class Output:
    """The layers, outputs and storage type of an engine's results."""

    layers: tuple[int, ...]
    outputs: tuple[str, ...]  # of `lengthwise.esm2.tensors.OUTPUTS`
    storage_dtype: str
    contacts_max_residues: int = 0  # of sequences that have contacts
    rounds_contacts: bool = True  # to float16, whatever the storage type

    @property
    def stored_dtype(self) -> torch.dtype:
        return DTYPES[self.storage_dtype]

    @property
    def contacts_dtype(self) -> torch.dtype:
        return torch.float16 if self.rounds_contacts else torch.float32

    def computed(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose representations are needed, of a model with so many."""
        return tuple({*self.layers, num_layers}) if {"logits", "contacts"} & {*self.outputs} else self.layers

    def pool(self, hidden: dict[int, Tensor], packing: Packing) -> dict[str, Tensor]:
        """The tensors of a batch that hidden representations give: ``layer_<n>`` [R, D] in the storage type, pooled ones [N, D].

        Pooled vectors are float32: ``mean_<n>``, ``max_<n>`` and ``std_<n>`` over a sequence's residues, ``bos_<n>``. The
        standard deviation is the population's, which one residue has too: 0.

        Parameters
        ----------
        hidden
            {layer: [T, D]} in float32, of some or all of the layers.
        packing
            Where each sequence lies among the T tokens.
        """
        results = {}
        for layer in (layer for layer in self.layers if layer in hidden):
            residues = hidden[layer].index_select(0, packing.residues)  # [R, D]
            if "residue" in self.outputs:
                results[f"layer_{layer}"] = residues.to(self.stored_dtype)
            if "bos" in self.outputs:
                results[f"bos_{layer}"] = hidden[layer].index_select(0, packing.bounds[:-1])  # [N, D]
            pooled = over_residues(residues, packing, [output for output in tensors.OF_ROWS if output in self.outputs])
            results |= {f"{output}_{layer}": vectors for output, vectors in pooled.items()}
        return results

    def bytes_of(self, width: int, tokens: int, sequences: int) -> int:
        """The bytes of the stored tensors of so many tokens and sequences, at a model's width; without contacts."""
        residues, found = tokens - 2 * sequences, 0
        for name in tensors.names(self.outputs, self.layers):
            n, itemsize = (residues, self.stored_dtype.itemsize) if tensors.by_residue(name) else (sequences, 4)
            found += 0 if name == "contacts" else n * math.prod(_width(name, width)) * itemsize
        return found

    def contact_bytes(self, lengths: Sequence[int]) -> tuple[int, int]:
        """The bytes of contacts of sequences of so many tokens: stored, and of their sums while they are computed."""
        if "contacts" not in self.outputs:
            return 0, 0
        residues = np.array(lengths) - 2  # [N]
        pairs = int(tensors.pair_counts(residues, self.contacts_max_residues).sum())
        sums = 4 * int(np.square(residues + 2)[residues <= self.contacts_max_residues].sum())
        return self.contacts_dtype.itemsize * pairs, sums

    def of_nan(self, residues: int, width: int) -> dict[str, Tensor]:
        """The stored tensors of one sequence that does not fit into memory: NaN everywhere."""
        results = {}
        for name in tensors.names(self.outputs, self.layers):
            n, dtype = (residues, self.stored_dtype) if tensors.by_residue(name) else (1, torch.float32)
            if name == "contacts":
                n = int(tensors.pair_counts(np.array([residues]), self.contacts_max_residues)[0])
                dtype = self.contacts_dtype
            results[name] = torch.full((n, *_width(name, width)), torch.nan, dtype=dtype)
        return results


def _width(name: str, width: int) -> tuple[int, ...]:
    """The shape of a tensor's entry, at a model's width."""
    return (width,) if tensors.is_vector(name) else (VOCABULARY_SIZE,) if name == "logits" else ()


def over_residues(residues: Tensor, packing: Packing, outputs: Collection[str]) -> dict[str, Tensor]:
    """Pool each sequence's residues: float32 [R, D] -> {output: [N, D]}, for `outputs` of mean, max and std."""
    results: dict[str, Tensor] = {}
    if not outputs:
        return results
    counts = _residue_counts(packing)  # [N]
    mean = _reduce(residues, packing, "mean")  # [N, D]
    if "mean" in outputs:
        results["mean"] = mean
    if "max" in outputs:
        # A maximum does not show that another residue's number is -inf; the mean does.
        results["max"] = _reduce(residues, packing, "max") + 0 * mean
    if "std" in outputs:
        # From differences: the mean of squares would cancel in channels whose mean is thousands of spreads.
        means = mean.repeat_interleave(counts, dim=0, output_size=len(residues))  # [R, D]
        results["std"] = _reduce((residues - means).square_(), packing, "mean").sqrt_()
    return results


def finite_status(results: dict[str, Tensor], packing: Packing, contacts_max_residues: int = 0) -> Tensor:
    """[N] uint8: GOOD where all stored numbers of a sequence are finite in their stored type, NON_FINITE elsewhere."""
    finite = torch.ones(len(packing.lengths), dtype=torch.bool, device=packing.bounds.device)  # [N]
    for name, value in results.items():
        if name == tensors.PERPLEXITY:  # of finite logits; infinite where they find a residue impossible
            continue
        entries = value.isfinite() if value.dim() == 1 else value.isfinite().all(dim=1)  # [R], [P] or [N]
        counts = _counts_of(name, packing, contacts_max_residues)  # [N]
        if counts is not None:
            bad_before = F.pad(entries.logical_not().cumsum(0), (1, 0))  # [R + 1] or [P + 1]
            ends = F.pad(counts.cumsum(0), (1, 0))  # [N + 1]
            entries = bad_before.index_select(0, ends).diff() == 0  # [N]
        finite &= entries
    return torch.where(finite, Status.GOOD, Status.NON_FINITE).to(torch.uint8)


def fill_bad_with_nan(
    results: dict[str, Tensor], status: Tensor, packing: Packing, contacts_max_residues: int = 0
) -> None:
    """Overwrite, on the host, the numbers of every sequence whose status is not GOOD."""
    bad = status.numpy() != Status.GOOD  # [N]
    if not bad.any():
        return
    for name, value in results.items():  # as arrays: torch forbids writing to inference tensors
        counts = _counts_of(name, packing, contacts_max_residues)
        value.numpy()[bad if counts is None else bad.repeat(counts.numpy())] = np.nan


def _counts_of(name: str, packing: Packing, contacts_max_residues: int) -> Tensor | None:
    """How many entries each sequence has in a tensor [N], on the packing's device; None where each has one."""
    if tensors.by_residue(name):
        return _residue_counts(packing)
    if name != "contacts":
        return None
    residues = _residue_counts(packing)
    return torch.where(residues <= contacts_max_residues, residues * (residues + 1) // 2, 0)


def _reduce(values: Tensor, packing: Packing, how: str) -> Tensor:
    """The mean or the maximum (mean, max) of each sequence's residues: [R, D] -> [N, D]."""
    if values.device.type == "cpu":
        return torch.segment_reduce(values, how, lengths=_residue_counts(packing), unsafe=True)
    return _reduce_in_parts(values, packing, how)


def _reduce_in_parts(values: Tensor, packing: Packing, how: str) -> Tensor:
    """`_reduce` for GPUs, which reduce a segment's rows one after another: [R, D] -> [N, D]."""
    counts, size = _residue_counts(packing), RESIDUES_PER_PART  # [N]
    n_parts = sum((length - 2 + size - 1) // size for length in packing.lengths)  # P
    per_sequence = (counts + size - 1) // size  # [N]
    first = (per_sequence.cumsum(0) - per_sequence).repeat_interleave(per_sequence, output_size=n_parts)  # [P]
    earlier = torch.arange(n_parts, device=counts.device) - first  # [P] parts of the same sequence
    left = counts.repeat_interleave(per_sequence, output_size=n_parts) - size * earlier  # [P]
    of_parts = "sum" if how == "mean" else how
    parts = torch.segment_reduce(values, of_parts, lengths=left.clamp(max=size), unsafe=True)  # [P, D]
    whole = torch.segment_reduce(parts, of_parts, lengths=per_sequence, unsafe=True)  # [N, D]
    return whole / counts[:, None] if how == "mean" else whole


def _residue_counts(packing: Packing) -> Tensor:
    return packing.bounds.diff().long() - 2  # [N]
