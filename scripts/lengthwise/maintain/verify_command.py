"""`python -m lengthwise verify`: a line for each problem, and quarantine on request."""

import logging
import sys
from collections import Counter
from pathlib import Path

from lengthwise.maintain.quarantine import Problem, quarantine
from lengthwise.maintain.verify import verify
from lengthwise.system.logging import error_line

MAX_IDENTICAL_MESSAGES = 10


def run(store: Path, quick: bool, repair: bool) -> int:
    """Verify a store and print the result.

    Parameters
    ----------
    store
        The folder ``results/<model>``.
    quick
        Compare sizes, and leave out the bytes of embeddings and weights.
    repair
        Quarantine damaged files, so that the next run makes them again.

    Returns
    -------
    The exit code: 0 where nothing is wrong, or every damaged file is in quarantine.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    problems: list[Problem] = []
    printed: set[str] = set()  # datasets share shards, and so problems
    times_seen: Counter[str] = Counter()
    for result in verify(store, quick):
        problems += result.problems
        new = dict.fromkeys(problem.message for problem in result.problems if problem.message not in printed)
        printed |= new.keys()
        for message in new:
            what = message.partition(": ")[2]
            times_seen[what] += 1
            if times_seen[what] <= MAX_IDENTICAL_MESSAGES:
                print(error_line(message), file=sys.stderr)
        if not result.problems:
            print(f"{result.name}: good" + (f", {result.note}" if result.note else ""), flush=True)
        elif not new:
            print(f"{result.name}: uses damaged files that are named above", flush=True)
    for what, n in times_seen.items():
        if n > MAX_IDENTICAL_MESSAGES:
            print(error_line(f"and {n - MAX_IDENTICAL_MESSAGES:,} more files: {what}"), file=sys.stderr)
    all_repairable = all(problem.path for problem in problems)
    lost = any(problem.path and problem.path.is_relative_to(store / "metrics") for problem in problems)
    again = "again, but for metrics" if lost else "again"
    if not repair:
        if any(problem.path for problem in problems):
            print(f"--repair quarantines the damaged files; the next run of snakemake makes them {again}")
        return 1 if problems else 0
    for path in quarantine(problems):
        print(f"in quarantine: {path}")
    if problems:
        rest = "" if all_repairable else "; repair the other problems by hand"
        print(f"run snakemake: it makes the missing files {again}{rest}")
    return 0 if all_repairable else 1
