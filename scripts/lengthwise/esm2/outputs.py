"""Outputs: which hidden representations are kept, how they are pooled, and whether their numbers are finite.

Shapes: T tokens of a batch, R residues, N sequences, D width, P pairs of residues (`lengthwise.esm2.tensors`).
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lengthwise.esm2 import tensors
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.model import Packing
from lengthwise.esm2.status import Status

# Residues that a GPU reduces one after another.
RESIDUES_PER_PART = 128


@dataclass(frozen=True)
class Output:
    """The layers, outputs and storage type of an engine's results."""

    layers: tuple[int, ...]
    outputs: tuple[str, ...]  # of `lengthwise.esm2.tensors.OUTPUTS`
    storage_dtype: str

    @property
    def stored_dtype(self) -> torch.dtype:
        return DTYPES[self.storage_dtype]

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
        """The bytes of the stored tensors of so many tokens and sequences, at a model's width."""
        residue_bytes = (tokens - 2 * sequences) * self.stored_dtype.itemsize
        names = tensors.names(self.outputs, self.layers)
        return width * sum(residue_bytes if tensors.by_residue(name) else 4 * sequences for name in names)

    def of_nan(self, residues: int, width: int) -> dict[str, Tensor]:
        """The stored tensors of one sequence that does not fit into memory: NaN everywhere."""
        results = {}
        for name in tensors.names(self.outputs, self.layers):
            if tensors.by_residue(name):
                results[name] = torch.full((residues, width), torch.nan, dtype=self.stored_dtype)
            else:
                results[name] = torch.full((1, width), torch.nan)
        return results


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


def finite_status(results: dict[str, Tensor], packing: Packing) -> Tensor:
    """[N] uint8: GOOD where all stored numbers of a sequence are finite in their stored type, NON_FINITE elsewhere."""
    finite = torch.ones(len(packing.lengths), dtype=torch.bool, device=packing.bounds.device)  # [N]
    for name, value in results.items():
        rows = value.isfinite().all(dim=1)  # [R] or [N]
        if tensors.by_residue(name):
            bad_before = F.pad(rows.logical_not().cumsum(0), (1, 0))  # [R + 1]
            ends = F.pad(_residue_counts(packing).cumsum(0), (1, 0))  # [N + 1]
            rows = bad_before.index_select(0, ends).diff() == 0  # [N]
        finite &= rows
    return torch.where(finite, Status.GOOD, Status.NON_FINITE).to(torch.uint8)


def fill_bad_with_nan(results: dict[str, Tensor], status: Tensor, packing: Packing) -> None:
    """Overwrite, on the host, the rows of every sequence whose status is not GOOD."""
    bad = status.numpy() != Status.GOOD  # [N]
    if not bad.any():
        return
    bad_residues = bad.repeat(_residue_counts(packing).numpy())  # [R]
    for name, value in results.items():  # as arrays: torch forbids writing to inference tensors
        value.numpy()[bad_residues if tensors.by_residue(name) else bad] = np.nan


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
