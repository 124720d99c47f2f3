"""HDF5 files in which a failed write raises an exception."""

import io
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class HDF5File(io.FileIO):
    """A new HDF5 file.

    The HDF5 library crashes the process if a write fails. So `write` reports success to it and keeps the error, and `create`
    raises the error.
    """

    def __init__(self, path: Path, attributes: dict):
        import h5py

        super().__init__(path, "w+")
        self.error: OSError | None = None
        self.file = h5py.File(self, "w")
        self.file.attrs.update(attributes)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        written = len(rest)
        try:
            while len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return written

    def truncate(self, length: int | None = None) -> int:
        try:
            return super().truncate(length)
        except OSError as error:
            self.error = self.error or error
            return length or 0

    def create(self, key: str, array: np.ndarray, record_id: str) -> None:
        """Add an array; its record's id becomes the attribute `original_id`.

        Raises
        ------
        OSError
            A write failed.
        """
        # HDF5 strings end at a NUL. Ingest escapes bytes that are not text in the same way.
        self.file.create_dataset(key, data=array).attrs["original_id"] = record_id.replace("\0", "\\x00")
        self.check()

    def check(self) -> None:
        if self.error:
            raise self.error

    def close(self) -> None:
        if not self.closed:
            self.file.close()
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self.check()
