"""Maintenance: progress, verify, prune, cleanup before a run, and a run's last lines.

In: a store. Out: what is true of it, said in lines; on request, damaged files in quarantine and unused ones deleted.
May import: `jobs`, `plan`, `store` and below.
"""
