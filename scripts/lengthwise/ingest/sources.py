"""The FASTA files of a dataset, in order: which one has a record, and what was read of each."""

import hashlib
from bisect import bisect_left
from pathlib import Path

from lengthwise.ingest.fasta import place
from lengthwise.ingest.identity import in_words, joint_sha256


class Source:
    """A FASTA file while it is read.

    Attributes
    ----------
    path
        The file.
    before
        The number of the dataset's records in earlier files.
    bytes, sha256
        Size and SHA-256 of what was read so far.
    records
        Its records, once it is read.
    """

    def __init__(self, path: Path, before: int):
        self.path, self.before, self.bytes, self.records = path, before, 0, 0
        self._hash = hashlib.sha256()

    def add(self, raw: bytes) -> None:
        """Count and hash the file's bytes."""
        self.bytes += len(raw)
        self._hash.update(raw)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Sources:
    """The files of a dataset as they were read. Records are numbered from 1 over all of them."""

    def __init__(self) -> None:
        self.read: list[Source] = []

    def locate(self, record_no: int) -> tuple[Path, int]:
        """The file that has a record, and the record's number in it."""
        source = self.read[bisect_left([source.before for source in self.read], record_no) - 1]
        return source.path, record_no - source.before

    def named(self, record_no: int) -> str:
        """A record in words, with its file if there are several: record 3 of b.fasta."""
        path, number = self.locate(record_no)
        return f"record {number}" + (f" of {path}" if len(self.read) > 1 else "")

    def place(self, record_no: int) -> str:
        """Byte and line of a record in its file, in words; reads the file again."""
        return place(*self.locate(record_no))

    def summary(self) -> dict:
        """What `summary.json` says of the input.

        Of one file ``input``, ``input_bytes``, ``input_sha256``. Of several the bytes of all and their `joint_sha256`;
        ``sources`` then lists path, bytes, SHA-256 and records of each.
        """
        listed = [
            {"file": str(one.path), "bytes": one.bytes, "sha256": one.sha256, "records": one.records}
            for one in self.read
        ]
        return {
            "input": in_words([one.path for one in self.read]),
            "input_bytes": sum(one.bytes for one in self.read),
            "input_sha256": joint_sha256(one.sha256 for one in self.read),
            **({"sources": listed} if len(listed) > 1 else {}),
        }
