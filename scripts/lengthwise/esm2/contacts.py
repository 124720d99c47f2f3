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
        Attention maps of at most this size are computed at once, one head of one sequence at least.
    """

    def __init__(self, head: ContactHead, packing: Packing, max_residues: int, block_bytes: int):
        self.head, self.block_numbers = head, block_bytes // 4
        self.runs: list[
            tuple[slice, Tensor]
        ] = []  # the tokens of sequences of equal length, and their sums [n, 1, L * L]
        start = 0
        for length, group in groupby(packing.lengths):
            n = sum(1 for _ in group)
            if length - 2 <= max_residues:
                sums = torch.zeros(n, 1, length * length, device=packing.bounds.device)
                self.runs.append((slice(start, start + n * length), sums))
            start += n * length

    def add(self, index: int, q: Tensor, k: Tensor) -> None:
        """Add the attention maps of a layer (counted from 0): its rotated queries and keys [T, H, C]."""
        for span, sums in self.runs:
            n = len(sums)
            of_run = (part[span].unflatten(0, (n, -1)).transpose(1, 2) for part in (q, k))  # [n, H, L, C] each
            queries, keys = of_run
            heads, length = queries.shape[1:3]
            at_once = max(1, self.block_numbers // length**2)  # maps
            sequences = max(1, min(n, at_once // heads))
            for first in range(0, n, sequences):
                for head in range(0, heads, at_once):
                    some = slice(first, first + sequences), slice(head, head + at_once)
                    weight = self.head.weight[index, some[1]]  # [h]
                    self._add_block(sums[some[0]], queries[some].float(), keys[some].float(), weight)

    @staticmethod
    def _add_block(sums: Tensor, queries: Tensor, keys: Tensor, weight: Tensor) -> None:
        """Add h heads [h] of n sequences, queries and keys [n, h, L, C], to the sums [n, 1, L * L] in place."""
        length = queries.shape[2]
        scores = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(2, 3))  # [n, h, L, L]
        maps = scores.softmax(-1)  # [n, h, L, L]
        del scores
        sums.baddbmm_(weight.expand(len(sums), 1, -1), maps.flatten(2))
        residues = maps[:, :, 1:-1, 1:-1]  # [n, h, L - 2, L - 2]
        rows = F.pad(residues.sum(3) + residues.sum(2), (1, 1))  # [n, h, L]
        scaled = rows * (weight / rows.sum(2).clamp_min(_TINY))[..., None]  # [n, h, L]
        sums.view(-1, length, length).baddbmm_(scaled.transpose(1, 2), rows, alpha=-0.5)

    def probabilities(self) -> Tensor:
        """The probabilities of contact [P]: the upper triangle of each sequence that has contacts, row by row."""
        found = [torch.empty(0, device=self.head.bias.device)]
        for _, sums in self.runs:
            length = round(sums.shape[2] ** 0.5)
            half = sums.view(-1, length, length)[:, 1:-1, 1:-1]  # [n, L - 2, L - 2]
            logits = half + half.transpose(1, 2) + self.head.bias
            row, column = torch.triu_indices(length - 2, length - 2, device=logits.device)
            found.append(logits[:, row, column].sigmoid_().flatten())
        return torch.cat(found)
