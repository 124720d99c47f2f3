"""What ESM-2 predicts of a protein, from stored logits and contacts: likelihoods, entropies, substitutions, contact maps."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from lengthwise.esm2.tensors import unpacked
from lengthwise.esm2.tokens import STANDARD, VOCABULARY, tokenize

if TYPE_CHECKING:
    import pandas as pd

_AMINO_ACIDS = list(STANDARD.decode())


class Predictions(ABC):
    """Reading of logits and contacts by id or number.

    All of it comes from one pass over the whole protein, without masks: the model sees the residue that it predicts. Errors are
    those of reading an array, and a LengthwiseError where the output was not stored.
    """

    @abstractmethod
    def sequence(self, key: str | int) -> str:
        """The residues of a record as they were embedded."""

    @abstractmethod
    def _place(self, key: str | int) -> int:
        """The place of a record by its id or number."""

    @abstractmethod
    def _result(self, place: int, name: str) -> np.ndarray:
        """What is stored of the record at a place: logits (L, 33); contacts, the (L (L + 1) / 2,) upper triangle."""

    def logits(self, key: str | int) -> "pd.DataFrame":
        """The logits of a protein: a row for each position, counted from 1, and a column for each of ESM-2's 33 tokens.

        Columns are in ESM-2's own order: its special tokens, then residues, most frequent first.

        Examples
        --------
        >>> ds = lengthwise.open("results/esm2_t6_8M_UR50D/datasets/example")  # doctest: +SKIP
        >>> ds.logits("P02135").loc[10, "A"]  # doctest: +SKIP
        """
        return self._by_position(self._result(self._place(key), "logits"), list(VOCABULARY))

    def log_likelihood(self, key: str | int) -> np.ndarray:
        """The log-likelihood (natural) of each residue that is there, among all 33 tokens: (L,) float64.

        The exponential of its negative mean is the record's `pseudo_perplexity`.
        """
        likely = _log_softmax(self._result(self._place(key), "logits"))  # (L, 33)
        return np.take_along_axis(likely, self._tokens(key), axis=1)[:, 0]

    def entropy(self, key: str | int) -> np.ndarray:
        """The entropy, in nats, of the 20 amino acids at each position: (L,) float64, from 0 to ln 20.

        Probabilities are those among the 20 amino acids.
        """
        likely = _log_softmax(self._amino_acids(key))  # (L, 20)
        return -(np.exp(likely) * likely).sum(axis=1)

    def substitutions(self, key: str | int) -> "pd.DataFrame":
        """Log-odds (natural) of the 20 amino acids against the residue that is there: wild-type marginals.

        The score of Meier et al. 2021 (doi:10.1101/2021.07.09.450648) of the same name: one pass without masks, and the effects
        of several substitutions add up.

        Returns
        -------
        A row for each position, counted from 1, and a column for each amino acid; 0 for the one that is there.
        """
        there = np.take_along_axis(
            self._result(self._place(key), "logits").astype(np.float64), self._tokens(key), axis=1
        )
        return self._by_position((self._amino_acids(key) - there).astype(np.float32), _AMINO_ACIDS)

    def contacts(self, key: str | int) -> np.ndarray:
        """The probabilities of contact of a protein's residues: (L, L) float32, symmetric.

        A contact is a pair of residues whose C-beta atoms are less than 8 Angstrom apart (Rao et al. 2021,
        doi:10.1101/2020.12.15.422761). Pairs of fewer than six residues apart were not trained on.

        Raises
        ------
        LengthwiseError
            Contacts were not stored, or not of a protein of this length.
        """
        return unpacked(self._result(self._place(key), "contacts"))

    def _tokens(self, key: str | int) -> np.ndarray:
        """The columns (L, 1) of the residues that are there."""
        return tokenize(self.sequence(key).encode())[1:-1, None].astype(np.intp)

    def _amino_acids(self, key: str | int) -> np.ndarray:
        """The logits of the 20 amino acids: (L, 20) float64."""
        columns = tokenize(STANDARD)[1:-1]
        return self._result(self._place(key), "logits")[:, columns].astype(np.float64)

    @staticmethod
    def _by_position(numbers: np.ndarray, columns: list[str]) -> "pd.DataFrame":
        import pandas as pd

        index = pd.RangeIndex(1, len(numbers) + 1, name="position")
        return pd.DataFrame(np.array(numbers), index=index, columns=columns)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """(L, n) of any type to float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
