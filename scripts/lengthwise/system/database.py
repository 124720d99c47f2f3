"""DuckDB sessions with a memory limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from lengthwise.errors import LengthwiseError


@contextmanager
def out_of_core(rule: str, memory_bytes: int, spill: Path, threads: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an empty in-memory database that spills to disk when it reaches its memory limit.

    Parameters
    ----------
    rule
        Name of the rule, for the error message.
    memory_bytes
        DuckDB's memory limit.
    spill
        Folder for spilled data.
    threads
        Number of DuckDB threads.

    Raises
    ------
    LengthwiseError
        A query needs more memory than the limit although it spills.
    """
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_bytes}B",
        "temp_directory": str(spill),
        "threads": threads,
        "preserve_insertion_order": "false",
    }
    try:
        with duckdb.connect(config=config) as database:
            yield database
    except (duckdb.OutOfMemoryException, OSError) as error:
        # An Arrow reader raises DuckDB's error as an OSError.
        if isinstance(error, OSError) and "Out of Memory Error" not in str(error):
            raise
        raise LengthwiseError(
            f"{rule} ran out of its {memory_bytes:,} bytes of memory; give it more than the default of 2,000 MB, "
            f"for example with --set-resources {rule}:mem_mb=8000"
        ) from error
