"""Outputs: which hidden representations are kept, how they are pooled, and whether their numbers are finite.

Shapes: T tokens of a batch, R residues, N sequences, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.model import Packing
from lengthwise.esm2.status import Status

# Residues that a GPU sums one after another for a mean.
RESIDUES_PER_PART = 128


@dataclass(frozen=True)
class Output:
    """The layers, outputs and storage type of an engine's results."""

    layers: tuple[int, ...]
    outputs: tuple[str, ...]  # of residue, mean, bos
    storage_dtype: str

    @property
    def stored_dtype(self) -> torch.dtype:
        return DTYPES[self.storage_dtype]

    def pool(self, hidden: dict[int, Tensor], packing: Packing) -> dict[str, Tensor]:
        """The stored tensors of a batch: ``layer_<n>`` [R, D] in the storage type, ``mean_<n>`` and ``bos_<n>`` [N, D] float32.

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
            if "mean" in self.outputs:
                results[f"mean_{layer}"] = (
                    torch.segment_reduce(residues, "mean", lengths=_residue_counts(packing), unsafe=True)
                    if residues.device.type == "cpu"
                    else _means_in_parts(residues, packing)
                )  # [N, D]
            if "bos" in self.outputs:
                results[f"bos_{layer}"] = hidden[layer].index_select(0, packing.bounds[:-1])  # [N, D]
        return results

    def of_nan(self, residues: int, width: int) -> dict[str, Tensor]:
        """The stored tensors of one sequence that does not fit into memory: NaN everywhere."""
        results = {}
        for layer in self.layers:
            for output in self.outputs:
                if output == "residue":
                    results[f"layer_{layer}"] = torch.full((residues, width), torch.nan, dtype=self.stored_dtype)
                else:
                    results[f"{output}_{layer}"] = torch.full((1, width), torch.nan)
        return results


def finite_status(results: dict[str, Tensor], packing: Packing) -> Tensor:
    """[N] uint8: GOOD where all stored numbers of a sequence are finite in their stored type, NON_FINITE elsewhere."""
    finite = torch.ones(len(packing.lengths), dtype=torch.bool, device=packing.bounds.device)  # [N]
    for name, value in results.items():
        rows = value.isfinite().all(dim=1)  # [R] or [N]
        if name.startswith("layer_"):
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
        value.numpy()[bad_residues if name.startswith("layer_") else bad] = np.nan


def _means_in_parts(residues: Tensor, packing: Packing) -> Tensor:
    """The mean of each sequence's residues, for GPUs, which sum a segment's rows one after another: [R, D] -> [N, D]."""
    counts, size = _residue_counts(packing), RESIDUES_PER_PART  # [N]
    n_parts = sum((length - 2 + size - 1) // size for length in packing.lengths)  # P
    per_sequence = (counts + size - 1) // size  # [N]
    first = (per_sequence.cumsum(0) - per_sequence).repeat_interleave(per_sequence, output_size=n_parts)  # [P]
    earlier = torch.arange(n_parts, device=counts.device) - first  # [P] parts of the same sequence
    left = counts.repeat_interleave(per_sequence, output_size=n_parts) - size * earlier  # [P]
    sums = torch.segment_reduce(residues, "sum", lengths=left.clamp(max=size), unsafe=True)  # [P, D]
    return torch.segment_reduce(sums, "sum", lengths=per_sequence, unsafe=True) / counts[:, None]  # [N, D]


def _residue_counts(packing: Packing) -> Tensor:
    return packing.bounds.diff().long() - 2  # [N]
