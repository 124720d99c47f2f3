"""HDF5 files whose failed writes raise."""

import io
from pathlib import Path

import numpy as np


class HDF5File(io.FileIO):
    """A file for the HDF5 library, which ends the process where a write fails: it hears of none, and `create` raises."""

    def __init__(self, path: Path, attributes: dict):
        import h5py

        super().__init__(path, "w+")
        self.error: OSError | None = None
        self.file = h5py.File(self, "w")
        self.file.attrs.update(attributes)

    def write(self, data) -> int:
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
        """Add an array, with the id that it belongs to as its attribute `original_id`."""
        # HDF5's strings end at a NUL; ingest writes other bytes that are no text in this way.
        self.file.create_dataset(key, data=array).attrs["original_id"] = record_id.replace("\0", "\\x00")
        self.check()

    def check(self) -> None:
        if self.error:
            raise self.error

    def close(self) -> None:
        if not self.closed:
            self.file.close()
            super().close()

    def __exit__(self, kind, *_) -> None:
        self.close()
        if kind is None:
            self.check()
