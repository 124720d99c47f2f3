"""Maintenance of a store: progress, verify, prune, cleanup before a run, and the run summary.

In: a store. Out: lines of text about it; on request, damaged files in quarantine and unused files deleted.
May import: `jobs`, `plan`, `store` and below.
"""
