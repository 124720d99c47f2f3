"""The machine: files, locks, logs, GPUs, the scheduler, database sessions.

In: paths and plain values. Out: files that are there whole or not at all, locks, a log, a leased GPU, a DuckDB session.
May import: `lengthwise.errors` alone. Nothing here knows of proteins, models or stores.
"""
