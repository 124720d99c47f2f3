"""A model kept in memory: `lengthwise.load`. Engine, weights and rules for sequences are the workflow's."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lengthwise.direct.inputs import Input, Record
from lengthwise.direct.result import Embedding
from lengthwise.direct.windows import Windows
from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import download
from lengthwise.esm2.devices import DTYPES, resolve_device
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.heads import head_facts
from lengthwise.esm2.outputs import Output
from lengthwise.esm2.sources import require_model, weights_stamp
from lengthwise.esm2.streamed import StreamedEngine, open_engine
from lengthwise.esm2.tensors import OUTPUTS
from lengthwise.store.settings import resolve_layers
from lengthwise.system.cache import user_cache
from lengthwise.system.gpus import auto_device
from lengthwise.system.text import did_you_mean

log = logging.getLogger("lengthwise")
# A progress bar is shown from here on.
BAR_AFTER_SECONDS = 3.0


class Model:
    """Weights in memory, ready to embed. `lengthwise.load` makes it and has its parameters.

    Attributes
    ----------
    name
        The model's name, id or path.
    device, precision
        Where it computes (cuda, cpu), and in which type.
    num_layers, embed_dim
        The model's layers, and its width D.
    weights_sha256
        Which weights these are, as in a store's settings.
    random_weights
        Whether they are random, so that embeddings mean nothing.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        precision: str = "auto",
        weights: str | Path | None = None,
        batch_tokens: int | str = "auto",
    ):
        self.name = os.path.expanduser(model)
        require_model(self.name)
        if _chosen("device", device, ("auto", "cuda", "cpu")) == "auto":
            device = auto_device(on_cluster=False)
        if _chosen("precision", precision, ("auto", *DTYPES)) == "auto":
            precision = "float16" if device == "cuda" else "float32"
        if batch_tokens != "auto" and not (isinstance(batch_tokens, int) and batch_tokens > 0):
            raise LengthwiseError(f"batch_tokens: {batch_tokens!r} is neither auto nor a number of tokens")
        self.device, self.precision, self._batch_tokens = device, precision, batch_tokens
        self._folder = str(Path(weights).expanduser() if weights is not None else user_cache() / "weights")
        torch_device = resolve_device(device)
        with _messages_shown():
            receipt = self._fetch()
            self.num_layers, self.embed_dim = receipt["num_layers"], receipt["embed_dim"]
            self.weights_sha256, self.random_weights = receipt["sha256"], receipt["random_weights"]
            output = Output((self.num_layers,), ("mean",), "float32")
            self._engine = open_engine(Path(receipt["path"]), torch_device, precision, output)
        self._stamp = {key: receipt[key] for key in weights_stamp(self._engine.checkpoint)}
        self._require_unchanged()
        self._engines = {output: self._engine}  # of the same weights
        self._tokens: dict[Output, int] = {}
        if self.random_weights:
            warnings.warn(f"RANDOM WEIGHTS: embeddings of the model {self.name!r} mean nothing", stacklevel=4)

    def _fetch(self) -> dict:
        try:
            return download.fetch(self.name, self._folder)
        except OSError as error:
            what = f"{error.filename or self._folder}: {error.strerror or error}"
            raise LengthwiseError(f"{what}; give another folder for weights as 'weights'") from error

    def __repr__(self) -> str:
        shape = f"{self.num_layers} layers, width {self.embed_dim}"
        return f"<lengthwise model {self.name}: {shape}, {self.precision} on {self.device}>"

    def embed(
        self,
        sequences: Any,
        layers: int | Sequence[int] = (-1,),
        outputs: str | Sequence[str] = ("residue", "mean"),
        **options: Any,
    ) -> list[Embedding]:
        """Embed sequences: a list of results, one for each, in order. Parameters and errors as of `iter`."""
        return list(self.iter(sequences, layers, outputs, **options))

    def iter(
        self,
        sequences: Any,
        layers: int | Sequence[int] = (-1,),
        outputs: str | Sequence[str] = ("residue", "mean"),
        *,
        dtype: str = "float32",
        errors: str = "raise",
        nucleotides: str = "refuse",
        contacts_max_residues: int = 1022,
        progress: bool = True,
    ) -> Iterator[Embedding]:
        """Embed sequences one after the other, in order: for more results than memory holds.

        Sequences are read as they are needed, and at most about a gigabyte of results waits. The same sequence is computed once
        where it comes again soon.

        Parameters
        ----------
        sequences
            Strings in any iterable (the id is the number, from 0), pairs (id, string), a mapping or pandas Series of ids to
            strings, Biopython's records, or the path of a FASTA file (plain, gzip or zstd). They are normalised as by the
            workflow with its default policy.
        layers
            0 (embedding) to the model's number of layers; negative counts from the end.
        outputs
            Of residue, mean, bos, max, std, logits, contacts.
        dtype
            The type of residue, logits and contacts: float32, or float16 as the workflow stores by default.
        errors
            What a rejected sequence does: ``raise``, or ``return`` for a result that has a `reason` and no arrays. With
            ``raise`` sequences are judged before the first is computed, unless an iterator gives them.
        nucleotides
            Whether sequences that look like nucleotides raise (``refuse``) or not (``allow``).
        contacts_max_residues
            The longest sequence that has contacts.
        progress
            Whether to show a bar once the work takes more than three seconds, in a notebook or a terminal.

        Raises
        ------
        LengthwiseError
            A sequence is rejected; the error says which and why. One id has two different sequences. Most letters are in
            sequences that look like nucleotides. A file cannot be read or is not FASTA. The model has no such layer or head.
        """
        _chosen("errors", errors, ("raise", "return"))
        given = Input(sequences, _chosen("nucleotides", nucleotides, ("refuse", "allow")))
        engine = self._with(self._output(layers, outputs, dtype, contacts_max_residues))
        return self._results(given, engine, errors == "raise", progress)

    def _results(self, given: Input, engine: Engine, raises: bool, progress: bool) -> Iterator[Embedding]:
        total = self._judged(given, raises) if given.can_repeat else None
        with tqdm(
            total=total,
            unit=" residues",
            unit_scale=True,
            desc=Path(self.name).name,
            delay=BAR_AFTER_SECONDS,
            disable=None if progress else True,  # None: in a log there is no bar
        ) as bar:
            windows = Windows(
                engine, lambda: self._in_float32(engine.output), self._batch_tokens_of(engine), bar.update
            )
            for record, found in windows.embed(given.chunks()):
                if isinstance(engine, StreamedEngine):  # which reads the checkpoint again for each wave
                    self._require_unchanged()
                if raises and found.reason:
                    raise LengthwiseError(_rejected(given, record, found.reason))
                yield found

    def _judged(self, given: Input, raises: bool) -> int:
        """The residues to embed. If one is rejected and that raises, it does so before anything is computed."""
        residues = 0
        for record in (record for chunk in given.chunks() for record in chunk):
            if raises and record.reason:
                raise LengthwiseError(_rejected(given, record, record.reason))
            residues += len(record.residues)
        return residues

    def _output(
        self, layers: int | Sequence[int], outputs: str | Sequence[str], dtype: str, contacts_max_residues: int
    ) -> Output:
        if wrong := [layer for layer in _listed(layers) if not hasattr(layer, "__index__")]:
            raise LengthwiseError(f"layers: {wrong[0]!r} is no number of a layer")
        numbers = resolve_layers(_listed(layers), self.num_layers, "layers")
        asked = [_chosen("outputs", output, OUTPUTS) for output in _listed(outputs)]
        _chosen("dtype", dtype, ("float32", "float16"))
        if not numbers or not asked:
            raise LengthwiseError(f"{'outputs' if numbers else 'layers'}: none is given; give at least one")
        with_contacts = contacts_max_residues if "contacts" in asked else 0
        ordered = tuple(output for output in OUTPUTS if output in asked)
        return Output(tuple(numbers), ordered, dtype, with_contacts, rounds_contacts=dtype == "float16")

    def _with(self, output: Output) -> Engine:
        """The engine with these outputs."""
        if output not in self._engines:
            if "contacts" in output.outputs:
                with _messages_shown():
                    download.provide(self.name, self._folder, contact_regression=True)
            head_facts(self._engine.checkpoint, output.outputs)
            engine = self._engine.with_output(output)
            if engine.lm_head or engine.contact_head:  # read now
                self._require_unchanged()
            self._engines[output] = engine
        return self._engines[output]

    def _in_float32(self, output: Output) -> Engine:
        engine = self._engine.in_float32().with_output(output)
        self._require_unchanged()
        return engine

    def _require_unchanged(self) -> None:
        """Raise LengthwiseError if the checkpoint is another one than was checked: numbers of both would mix."""
        if weights_stamp(self._engine.checkpoint) != self._stamp:
            raise LengthwiseError(f"{self._engine.checkpoint}: changed since it was checked; load the model again")

    def _batch_tokens_of(self, engine: Engine) -> int:
        if isinstance(self._batch_tokens, int):
            return self._batch_tokens
        if engine.output not in self._tokens:
            self._tokens[engine.output] = engine.auto_batch_tokens()
        return self._tokens[engine.output]


def _listed(given: Any) -> list:
    """A list of what was given: of one value or of several."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def _chosen(name: str, value: str, choices: Sequence[str]) -> str:
    """The value of a parameter, if it is one of its choices."""
    if value not in choices:
        question = did_you_mean(str(value), list(choices))
        raise LengthwiseError(f"{name}: {value!r} is none of {', '.join(choices)};{question or ' give one of these'}")
    return value


def _rejected(given: Input, record: Record, reason: str) -> str:
    return (
        f"{given.describe(record)}: rejected: {reason}; take it out, or go on without it by errors='return', which gives the "
        "reason in its result"
    )


@contextmanager
def _messages_shown() -> Iterator[None]:
    """Show the package's messages, such as the progress of a download, unless the program has a log of its own."""
    if log.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
