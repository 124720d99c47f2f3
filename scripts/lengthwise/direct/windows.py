"""Records in windows: each sorted by length, cut into batches and embedded, and given back in the order of the input.

A window's sequences are distinct, and sorted and cut as a shard's are, so that a small input has the workflow's batches. While
the last batches of a window are computed the next ones are prepared.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lengthwise.direct.inputs import Record
from lengthwise.direct.result import Embedding
from lengthwise.esm2 import tensors
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.costs import result_bytes_per_token
from lengthwise.esm2.devices import is_out_of_memory
from lengthwise.esm2.engine import Engine
from lengthwise.esm2.passes import BatchResult
from lengthwise.esm2.status import Status, overflow_reason
from lengthwise.ingest.digests import digest
from lengthwise.system.text import count

log = logging.getLogger("lengthwise")
# Batches of a window for each that is computed at once: enough to fill them with sequences of like lengths on a GPU, few enough
# that on a CPU the first results come soon.
_WINDOW_BATCHES = {"cpu": 4, "cuda": 32}
# Most bytes of a window's results.
_WINDOW_BYTES = 1 << 30


class _Window:
    """Consecutive records, and the numbers of their distinct sequences as they come."""

    def __init__(self, records: list[Record], batch_tokens: int):
        self.records = records
        self.copies = Counter(one.residues for one in records if not one.reason)
        self.sequences = sorted(self.copies, key=lambda s: (len(s), digest(s)))
        lengths = np.array([len(sequence) for sequence in self.sequences], np.int64)
        self.batches = deque(list(cut_batches(lengths, batch_tokens))[::-1])  # longest sequences first
        self.found: dict[bytes, tuple[Status, dict[str, np.ndarray]]] = {}

    def take(self, result: BatchResult, contacts_max_residues: int) -> int:
        """Keep the results of the next batch; returns the residues of its records."""
        sequences = self.sequences[slice(*self.batches.popleft())]
        self.found |= zip(sequences, _split(result, sequences, contacts_max_residues), strict=True)
        return sum(len(sequence) * self.copies[sequence] for sequence in sequences)


class Windows:
    """Embeds records with an engine.

    Parameters
    ----------
    engine
        The model, with the outputs that are asked for.
    in_float32
        Returns the same in float32, for sequences that overflow half precision; it may be loaded only now.
    batch_tokens
        Tokens of a batch.
    on_batch
        Called with the residues of each batch's records when it is done.
    """

    def __init__(
        self,
        engine: Engine,
        in_float32: Callable[[], Engine],
        batch_tokens: int,
        on_batch: Callable[[int], object] = lambda residues: None,
    ):
        self.engine, self.in_float32, self.batch_tokens, self.on_batch = engine, in_float32, batch_tokens, on_batch
        self.open: deque[_Window] = deque()

    def embed(self, chunks: Iterable[list[Record]]) -> Iterator[tuple[Record, Embedding]]:
        """Each record with its embedding, in order; a rejected one has a reason and no arrays."""
        for result in self.engine.embed(self._batches(chunks)):
            yield from self._finished()
            self.on_batch(self.open[0].take(result, self.engine.output.contacts_max_residues))
            del result  # it may be large
            yield from self._finished()
        yield from self._finished()

    def _batches(self, chunks: Iterable[list[Record]]) -> Iterator[list[bytes]]:
        for records in self._cut(chunks):
            self.open.append(window := _Window(records, self.batch_tokens))
            for start, stop in list(window.batches):
                yield window.sequences[start:stop]

    def _cut(self, chunks: Iterable[list[Record]]) -> Iterator[list[Record]]:
        """Records of consecutive windows."""
        output = self.engine.output
        bytes_per_token = result_bytes_per_token(
            self.engine.model.config.embed_dim,
            len(output.layers),
            output.outputs,
            output.stored_dtype.itemsize,
            output.contacts_max_residues,
        )
        batches = _WINDOW_BATCHES[self.engine.device.type] * self.engine.at_once
        most = min(batches * self.batch_tokens, _WINDOW_BYTES // max(bytes_per_token, 1))
        records: list[Record] = []
        tokens = 0
        for record in (record for chunk in chunks for record in chunk):
            if records and tokens + len(record.residues) + 2 > most:
                yield records
                records, tokens = [], 0
            records.append(record)
            tokens += len(record.residues) + 2
        if records:
            yield records

    def _finished(self) -> Iterator[tuple[Record, Embedding]]:
        """The records of the first windows, as far as all their batches are done."""
        while self.open and not self.open[0].batches:
            window = self.open.popleft()
            self._repair(window)
            for record in window.records:
                status, arrays = window.found.get(record.residues, (Status.GOOD, {}))
                reason = record.reason or self._reason(status, len(record.residues))
                layers, arrays = self.engine.output.layers, {} if reason else arrays
                found = Embedding(record.id, record.residues.decode(), record.changes, reason, layers, arrays)
                yield record, found

    def _repair(self, window: _Window) -> None:
        """Compute sequences that overflowed half precision again, in float32."""
        overflowed = [s for s, (status, _) in window.found.items() if status == Status.NON_FINITE]
        if not overflowed or self.engine.precision == "float32":
            return
        what = f"{count(len(overflowed), 'sequence')} overflowed {self.engine.precision}"
        try:
            engine = self.in_float32()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("%s, and the weights in float32 do not fit into the device's memory too", what)
            return
        log.warning("%s; computed again in float32", what)
        for sequence, result in zip(overflowed, engine.embed([s] for s in overflowed), strict=True):
            (window.found[sequence],) = _split(result, [sequence], self.engine.output.contacts_max_residues)

    def _reason(self, status: Status, residues: int) -> str:
        if status == Status.NON_FINITE:
            output = self.engine.output
            return overflow_reason(self.engine.precision, output.storage_dtype, "dtype", output.outputs)
        if status == Status.DOES_NOT_FIT:
            gigabytes = self.engine.bytes_per_token * (residues + 2) / 1e9
            return f"does_not_fit: needs about {gigabytes:.1f} GB of memory beside the weights"
        return ""


def _split(
    result: BatchResult, sequences: list[bytes], contacts_max_residues: int
) -> list[tuple[Status, dict[str, np.ndarray]]]:
    """The status and the arrays of each sequence of a batch: copies, since the batch's memory may be a GPU's pinned memory."""
    lengths = np.array([len(sequence) for sequence in sequences])
    arrays: list[dict[str, np.ndarray]] = [{} for _ in sequences]
    for name, values in result.arrays.items():
        ends = np.cumsum(tensors.entries(name, lengths, {"contacts_max_residues": contacts_max_residues}))
        has_rows = tensors.by_residue(name) or name == "contacts"
        for own, rows in zip(arrays, np.split(values, ends[:-1]), strict=True):
            own[name] = np.array(rows if has_rows else rows[0])
    return [(Status(status), own) for status, own in zip(result.status.tolist(), arrays, strict=True)]
