"""The machine: files, locks, logs, GPUs, the scheduler, database sessions.

In: paths and plain values. Out: files written atomically, locks, a log, a leased GPU, a DuckDB session.
May import: `lengthwise.errors` alone. This room knows no proteins and no models; of a store it knows only which files to lock.
"""
