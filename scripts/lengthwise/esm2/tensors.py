"""The tensors of results, by name: the outputs they belong to, and which of their entries a sequence has. Imports no torch.

`layer_<n>` [R, D], `logits` [R, 33]; `mean_<n>`, `bos_<n>`, `max_<n>`, `std_<n>` [N, D], `pseudo_perplexity` [N]; `contacts` [P].
R residues, N sequences, D width, P pairs of residues: the upper triangle, diagonal included, of each sequence that has contacts.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy is imported where it is used, to keep it out of the Snakefile
    import numpy as np

POOLED = ("mean", "bos", "max", "std")
# Made from the residues' rows alone, stored ones too.
OF_ROWS = ("mean", "max", "std")
OUTPUTS = ("residue", *POOLED, "logits", "contacts")
PERPLEXITY = "pseudo_perplexity"
# By residue, or by pair; all others have one entry for each sequence.
_BY_RESIDUE = ("layer_", "logits")
_ALONE = ("logits", PERPLEXITY, "contacts")
_PREFIXES = ("layer_", *(f"{output}_" for output in POOLED))


def names(outputs: Iterable[str], layers: Iterable[int]) -> list[str]:
    """The tensors of outputs, each layer's in the order of `layers`."""
    found: list[str] = []
    for output in outputs:
        if output == "logits":
            found += ["logits", PERPLEXITY]
        elif output == "contacts":
            found.append("contacts")
        else:
            found += [f"{'layer' if output == 'residue' else output}_{layer}" for layer in layers]
    return found


def split(name: str) -> tuple[str, int | None]:
    """The output and the layer that a tensor is of; no layer for `logits`, `contacts` and `pseudo_perplexity`."""
    if name in _ALONE:
        return name, None
    kind, _, layer = name.partition("_")
    return "residue" if kind == "layer" else kind, int(layer)


def is_result(name: str) -> bool:
    """Whether a tensor of a shard holds results."""
    return name in _ALONE or name.startswith(_PREFIXES)


def is_vector(name: str) -> bool:
    """Whether a tensor's last dimension is the model's width."""
    return name.startswith(_PREFIXES)


def by_residue(name: str) -> bool:
    """Whether a tensor has a row for each residue."""
    return name.startswith(_BY_RESIDUE)


def pair_counts(lengths: "np.ndarray", max_residues: int) -> "np.ndarray":
    """Pairs [N] in the upper triangles of sequences of these lengths [N]; none where there are more than `max_residues`."""
    import numpy as np

    lengths = np.asarray(lengths, np.int64)
    return np.where(lengths <= max_residues, lengths * (lengths + 1) // 2, 0)


def unpacked(triangle: "np.ndarray") -> "np.ndarray":
    """A sequence's whole map of contacts (L, L) from its upper triangle, of any type: float32, symmetric."""
    import numpy as np

    length = (int(np.sqrt(8 * len(triangle) + 1)) - 1) // 2
    found = np.empty((length, length), np.float32)
    upper = np.triu_indices(length)
    found[upper] = triangle
    found.T[upper] = triangle
    return found


def entries(name: str, lengths: "np.ndarray", settings: Mapping) -> "np.ndarray":
    """Entries [N] of a tensor's first dimension that each sequence has.

    Parameters
    ----------
    name
        The tensor.
    lengths
        [N] residues of each sequence.
    settings
        The store's settings; `contacts_max_residues` where contacts are an output.
    """
    import numpy as np

    if by_residue(name):
        return np.asarray(lengths, np.int64)
    if name == "contacts":
        return pair_counts(lengths, settings["contacts_max_residues"])
    return np.ones(len(lengths), np.int64)


def over_rows(rows: "np.ndarray", kind: str) -> "np.ndarray":
    """The mean, max or std of a protein's rows (L, D), of any type: (D,) float32."""
    import numpy as np

    if kind == "max":
        return rows.max(axis=0).astype(np.float32)
    return getattr(rows, kind)(axis=0, dtype=np.float64).astype(np.float32)
