"""DuckDB within the memory that a rule has."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from lengthwise.errors import LengthwiseError


@contextmanager
def out_of_core(rule: str, memory_bytes: int, spill: Path, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A fresh database that writes to the folder `spill` what does not fit into its memory.

    Raises
    ------
    LengthwiseError
        Something would not fit even so.
    """
    config = {"memory_limit": f"{memory_bytes}B", "temp_directory": str(spill), "threads": threads}
    try:
        with duckdb.connect(config=config | {"preserve_insertion_order": "false"}) as database:
            yield database
    except (duckdb.OutOfMemoryException, OSError) as error:
        # An Arrow reader raises DuckDB's error as an OSError.
        if isinstance(error, OSError) and "Out of Memory Error" not in str(error):
            raise
        raise LengthwiseError(
            f"{rule} ran out of its {memory_bytes:,} bytes of memory; give it more than the 2,000 MB that it has by default, "
            f"for example with --set-resources {rule}:mem_mb=8000"
        ) from error
