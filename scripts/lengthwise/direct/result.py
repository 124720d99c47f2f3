"""What is found of one protein: its numbers by output and layer, or the reason why it has none."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import tensors


class NoNumbersError(LengthwiseError, AttributeError):
    """An output that was not computed, or not of this protein."""


@dataclass(frozen=True, slots=True, repr=False)
class Embedding:
    """One protein that was given: L residues, with vectors of the model's width D.

    An array that was not computed raises an error that says why. Of several layers, arrays are those of the first in `layers`;
    `layer` gives the others.

    Attributes
    ----------
    id
        The id that was given; of a string alone, its number in the list.
    sequence
        The residues that were embedded; empty if rejected.
    changes
        What normalisation changed, by the names of the workflow's column `changes`.
    reason
        Why it was rejected, as in the workflow's `rejected.tsv`; empty if it was embedded.
    layers
        The layers that were computed.
    """

    id: str
    sequence: str
    changes: tuple[str, ...]
    reason: str
    layers: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]  # by the names of `lengthwise.esm2.tensors`

    def __repr__(self) -> str:
        if self.reason:
            return f"<Embedding {self.id}: rejected: {self.reason}>"
        return f"<Embedding {self.id}: {len(self.sequence):,} residues, {' '.join(self.arrays)}>"

    @property
    def residue(self) -> np.ndarray:
        """(L, D) a row for each residue; BOS and EOS are left out."""
        return self._get(f"layer_{self.layers[0]}", "residue")

    @property
    def mean(self) -> np.ndarray:
        """(D,) float32: the mean over residues."""
        return self._get(f"mean_{self.layers[0]}", "mean")

    @property
    def max(self) -> np.ndarray:
        """(D,) float32: the maximum over residues."""
        return self._get(f"max_{self.layers[0]}", "max")

    @property
    def std(self) -> np.ndarray:
        """(D,) float32: the population's standard deviation over residues."""
        return self._get(f"std_{self.layers[0]}", "std")

    @property
    def bos(self) -> np.ndarray:
        """(D,) float32: the BOS token's vector."""
        return self._get(f"bos_{self.layers[0]}", "bos")

    @property
    def logits(self) -> np.ndarray:
        """(L, 33): of each residue, a number for each token in ESM-2's own order (`lengthwise.esm2.tokens.VOCABULARY`)."""
        return self._get("logits", "logits")

    @property
    def pseudo_perplexity(self) -> float:
        """From logits: the exponential of the residues' mean negative log-likelihood, from one pass without masks."""
        return float(self._get(tensors.PERPLEXITY, "logits"))

    @property
    def contacts(self) -> np.ndarray:
        """(L, L) float32, symmetric: the probabilities of contact, as of `ds.contacts`."""
        triangle = self._get("contacts", "contacts")
        if not len(triangle):
            raise NoNumbersError(
                f"{self.id}: no contacts of {len(self.sequence):,} residues; give embed a larger contacts_max_residues"
            )
        return tensors.unpacked(triangle)

    def layer(self, layer: int) -> "Embedding":
        """The same protein with the arrays of another layer.

        Parameters
        ----------
        layer
            One of `layers`.
        """
        if layer not in self.layers:
            raise NoNumbersError(
                f"{self.id}: layer {layer} was not computed; 'layers' gave {', '.join(map(str, self.layers))}"
            )
        return replace(self, layers=(layer, *(other for other in self.layers if other != layer)))

    def _get(self, name: str, output: str) -> np.ndarray:
        if self.reason:
            raise NoNumbersError(f"{self.id} was rejected: {self.reason}")
        if name not in self.arrays:
            raise NoNumbersError(f"{self.id}: {output} was not computed; add it to 'outputs'")
        return self.arrays[name]
