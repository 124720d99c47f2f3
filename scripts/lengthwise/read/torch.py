"""A dataset for torch: a map-style Dataset, and padded or packed batches."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

Item = tuple[str, torch.Tensor]


class Padded(NamedTuple):
    """A batch padded to the length of its longest protein."""

    ids: list[str]
    rows: torch.Tensor  # (N, L, D), zero beyond a protein's end
    mask: torch.Tensor  # (N, L) bool, true where there is a residue


class Packed(NamedTuple):
    """A batch end to end, in the form that ``torch.nn.attention.varlen.varlen_attn`` takes."""

    ids: list[str]
    rows: torch.Tensor  # (R, D)
    cu_seqlens: torch.Tensor  # (N + 1,) int32: protein i has rows cu_seqlens[i] to cu_seqlens[i + 1]
    max_length: int


class Proteins(Protocol):
    """The part of `lengthwise.read.dataset.Dataset` that is read here."""

    @property
    def ids(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> np.ndarray: ...


class TorchDataset(torch.utils.data.Dataset[Item]):
    """(id, (L, D) tensor) by number. The tensors are copies, of `dtype` if one is given. Made by `Dataset.torch`.

    A DataLoader may send it to forked or spawned workers: each worker opens the files itself.
    """

    def __init__(self, dataset: Proteins, dtype: torch.dtype | None = None):
        self.dataset, self.dtype = dataset, dtype

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Item:
        rows = torch.from_numpy(np.array(self.dataset[number]))
        return self.dataset.ids[number], rows if self.dtype is None else rows.to(self.dtype)

    @staticmethod
    def pad(items: list[Item]) -> Padded:
        """Collate to (N, L, D), zero beyond a protein's end. For a DataLoader's `collate_fn`.

        Raises
        ------
        ValueError
            The batch is empty.
        """
        ids, rows = _unzip(items)
        lengths = torch.tensor([len(protein) for protein in rows])
        padded = pad_sequence(rows, batch_first=True)
        return Padded(ids, padded, torch.arange(padded.shape[1]) < lengths[:, None])

    @staticmethod
    def pack(items: list[Item]) -> Packed:
        """Collate to (R, D) end to end. For a DataLoader's `collate_fn`.

        Raises
        ------
        ValueError
            The batch is empty.
        """
        ids, rows = _unzip(items)
        lengths = [len(protein) for protein in rows]
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return Packed(ids, torch.cat(rows), ends, max(lengths))


def _unzip(items: list[Item]) -> tuple[list[str], list[torch.Tensor]]:
    if not items:
        raise ValueError("an empty batch cannot be collated")
    ids, rows = zip(*items, strict=True)
    return list(ids), list(rows)
