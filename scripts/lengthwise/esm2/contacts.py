"""Contacts: a logistic regression on ESM-2's attention maps, summed up layer by layer as the forward pass goes.

fair-esm keeps the maps of all heads and layers; here a map lives until it is added to its sequence's sum. With A the map of a
head without BOS and EOS, w its weight, r the row sums of the symmetric map A + A' and t their total, the average product
correction leaves A + A' - r r' / t. So the regression's sum is S + S', where S is the sum of w (A - r r' / 2t) over all heads.
Shapes: T tokens of a batch, H heads, C channels of a head, N sequences, P pairs of residues; n sequences of length L with BOS and
EOS. All in float32.
The reference is fair-esm 2.0.0, `esm.modules.ContactPredictionHead` (Rao et al. 2021, doi:10.1101/2020.12.15.422761).
"""

import hashlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lengthwise.esm2.checkpoint import load_head
from lengthwise.esm2.model import Packing

# Stays in a core's cache; larger blocks take memory and are no faster.
CPU_BLOCK_BYTES = 2 << 20
# A head that attends to BOS and EOS alone has an empty map: nothing is corrected, where fair-esm divides zero by zero.
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ContactHead:
    """The regression's weights of each layer and head, and its bias."""

    weight: Tensor  # [layers, H] float32
    bias: Tensor  # [1] float32

    @classmethod
    def load(cls, path: Path, num_layers: int, device: torch.device) -> "ContactHead":
        """Load a checkpoint's contact head.

        Raises
        ------
        LengthwiseError
            The checkpoint does not have it.
        """
        weights = load_head(path, "contact_head", device)
        return cls(weights["regression.weight"].view(num_layers, -1), weights["regression.bias"])

    @property
    def sha256(self) -> str:
        """The identity of the weights, whatever file they are from: SHA-256 of both as little-endian float32."""
        numbers = torch.cat([self.weight.flatten(), self.bias]).cpu().numpy()
        return hashlib.sha256(numbers.astype("<f4").tobytes()).hexdigest()


class ContactSums:
    """The regression's sums of a batch's sequences while it passes through the layers.

    Parameters
    ----------
    head
        The regression.
    packing
        Where the sequences lie among the T tokens.
    max_residues
        Longer sequences have no contacts.
    block_bytes
        Rows of attention maps of about this size are computed at once, one row of each head of a sequence at least.
    """

    def __init__(self, head: ContactHead, packing: Packing, max_residues: int, block_bytes: int):
        self.head, self.block_numbers = head, block_bytes // 4
        # The tokens of neighbours of equal length, and their sums [n, L - 2, L]: no rows of BOS and EOS.
        self.runs: list[tuple[slice, Tensor]] = []
        start = 0
        for length, group in groupby(packing.lengths):
            n = sum(1 for _ in group)
            if length - 2 <= max_residues:
                sums = torch.zeros(n, length - 2, length, device=packing.bounds.device)
                self.runs.append((slice(start, start + n * length), sums))
            start += n * length

    def add(self, index: int, q: Tensor, k: Tensor) -> None:
        """Add the attention maps of a layer (counted from 0): its rotated queries and keys [T, H, C]."""
        for span, sums in self.runs:
            n, _, length = sums.shape
            at_once = max(1, self.block_numbers // (q.shape[1] * length**2))  # sequences
            tokens = (part[span].unflatten(0, (n, length)).transpose(1, 2) for part in (q, k))
            queries, keys = tokens  # [n, H, L, C] each
            for first in range(0, n, at_once):
                some = slice(first, first + at_once)
                self._add_maps(sums[some], queries[some], keys[some], self.head.weight[index])

    def _add_maps(self, sums: Tensor, queries: Tensor, keys: Tensor, weight: Tensor) -> None:
        """Add the maps of n sequences, queries and keys [n, H, L, C], weighted [H], to their sums in place."""
        n, heads, length, channels = queries.shape
        keys = keys.float().transpose(2, 3)  # [n, H, C, L]
        rows_at_once = max(1, self.block_numbers // (n * heads * length))
        columns = torch.zeros(n, heads, length, device=sums.device)
        of_rows = []
        for first in range(1, length - 1, rows_at_once):
            rows = slice(first, min(first + rows_at_once, length - 1))  # r of them
            scores = torch.matmul(queries[:, :, rows].float() * channels**-0.5, keys)  # [n, H, r, L]
            maps = scores.softmax(-1)  # [n, H, r, L]
            del scores
            of_rows.append(maps[..., 1:-1].sum(3))  # [n, H, r]
            columns += maps.sum(2)
            weighted = torch.matmul(weight, maps.flatten(2))  # [n, r * L]
            sums[:, rows.start - 1 : rows.stop - 1] += weighted.unflatten(1, (-1, length))
        totals = torch.cat(of_rows, 2) + columns[..., 1:-1]  # [n, H, L - 2]
        scaled = totals * (weight / totals.sum(2).clamp_min(_TINY))[..., None]  # [n, H, L - 2]
        sums.baddbmm_(scaled.transpose(1, 2), F.pad(totals, (1, 1)), alpha=-0.5)

    def probabilities(self, dtype: torch.dtype) -> Tensor:
        """The probabilities of contact [P]: the upper triangle of each sequence that has contacts, row by row."""
        found = [torch.empty(0, dtype=dtype, device=self.head.bias.device)]
        for _, sums in self.runs:
            half = sums[..., 1:-1]  # [n, L - 2, L - 2]
            whole = (half + half.transpose(1, 2)).add_(self.head.bias).sigmoid_().to(dtype)
            residues = len(whole[0])
            row, column = torch.triu_indices(residues, residues, dtype=torch.int32, device=whole.device)
            found.append(whole.flatten(1).index_select(1, row * residues + column).flatten())
        return torch.cat(found)
