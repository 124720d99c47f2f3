"""Lengthwise: batch protein embedding with ESM-2.

>>> import lengthwise
>>> ds = lengthwise.open("results/demo/datasets/example")
>>> ds["sp|P02135|HBB_LITCT"].shape
(140, 320)

Without a workflow, `embed` and `load` turn sequences in memory into arrays.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lengthwise._version import __version__
from lengthwise.errors import LengthwiseError

if TYPE_CHECKING:
    from lengthwise.direct.model import Model
    from lengthwise.direct.result import Embedding
    from lengthwise.read.embeddings import Embeddings
    from lengthwise.read.joined import Joined

__all__ = ["LengthwiseError", "__version__", "concat", "embed", "load", "open"]


# Annotated with Any: a path alone tells whether it is a Dataset or a Store, and a union would have every use checked.
def open(path: str | Path) -> Any:
    """Open a finished dataset, or a store, for reading.

    Parameters
    ----------
    path
        ``results/<model>/datasets/<dataset>`` opens a dataset, see `lengthwise.read.dataset.Dataset`. ``results/<model>`` opens
        the store, see `lengthwise.read.store.Store`: all finished datasets by name.

    Raises
    ------
    LengthwiseError
        There is no such folder, nothing in it is finished, or it is damaged.
    """
    from lengthwise.read.completeness import is_store  # imported here to keep numpy out of the Snakefile
    from lengthwise.read.dataset import Dataset
    from lengthwise.read.store import Store

    return Store(path) if is_store(Path(path)) else Dataset(path)


def concat(datasets: "Iterable[Embeddings]") -> "Joined":
    """Join datasets, or selections of them, one after the other: see `lengthwise.read.joined.Joined`.

    Raises
    ------
    LengthwiseError
        Their numbers are not comparable, they read different layers, or one id names two different sequences.

    Examples
    --------
    >>> ds = lengthwise.open("results/demo/datasets/example")
    >>> both = lengthwise.concat([ds[:2], ds[70:]])
    >>> len(both), both.pooled().shape
    (11, (11, 320))
    """
    from lengthwise.read.joined import Joined

    return Joined.of(datasets)


def load(
    model: str | Path,
    device: str = "auto",
    precision: str = "auto",
    *,
    weights: str | Path | None = None,
    batch_tokens: int | str = "auto",
) -> "Model":
    """Load a model to embed with, and keep its weights in memory: see `lengthwise.direct.model.Model`.

    Parameters
    ----------
    model
        An ESM-2 name such as ``esm2_t33_650M_UR50D``; an id of the Hugging Face hub; the path of a checkpoint; or ``demo``, whose
        weights are random, with a warning. The same as `model` in the workflow's config.
    device
        ``cuda``, ``cpu``, or ``auto``: cuda where a GPU is visible.
    precision
        The compute type: ``float32``, ``float16``, ``bfloat16``, or ``auto``: float16 on cuda, float32 on cpu.
    weights
        The folder of the weights of names, which are downloaded once. Without it, ``lengthwise/weights`` in the user's cache
        (``XDG_CACHE_HOME``, else ``~/.cache``).
    batch_tokens
        Tokens of a forward pass, or ``auto``.

    Raises
    ------
    LengthwiseError
        The weights cannot be had or are not ESM-2, there is no such device, or a package of the extra `embed` is not installed.

    Examples
    --------
    >>> model = lengthwise.load("demo")
    >>> [protein.residue.shape for protein in model.embed(["MKTAYIAKQR", "GLSDGEW"])]
    [(10, 320), (7, 320)]
    """
    return _load(model, device, precision, weights, batch_tokens)


def embed(
    sequences: Any,
    model: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    weights: str | Path | None = None,
    batch_tokens: int | str = "auto",
    **options: Any,
) -> "list[Embedding]":
    """Embed sequences once: `load` and `Model.embed` in one call. To embed again, keep what `load` returns.

    Parameters
    ----------
    sequences
        Strings, a mapping of ids to strings, Biopython's records, or the path of a FASTA file.
    model, device, precision, weights, batch_tokens
        As of `load`.
    **options
        As of `lengthwise.direct.model.Model.iter`: `layers`, `outputs`, `dtype`, `errors` and others.

    Returns
    -------
    A `lengthwise.direct.result.Embedding` for each sequence, in order.

    Raises
    ------
    LengthwiseError
        As for `load`; or a sequence is rejected.

    Examples
    --------
    >>> proteins = lengthwise.embed({"one": "MKTAYIAKQR", "other": "GLSDGEW"}, model="demo")
    >>> {protein.id: protein.mean.shape for protein in proteins}
    {'one': (320,), 'other': (320,)}
    """
    return _load(model, device, precision, weights, batch_tokens).embed(sequences, **options)


def _load(*arguments: Any) -> "Model":
    from lengthwise.system.extras import named_extras

    with named_extras():
        from lengthwise.direct.model import Model

        return Model(*arguments)
