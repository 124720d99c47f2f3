"""`python -m lengthwise verify`: what was found, a line each."""

import logging
import sys
from collections import Counter
from pathlib import Path

from lengthwise.maintain.verify import Problem, quarantine, verify

MAX_IDENTICAL_MESSAGES = 10


def run(store: Path, quick: bool, repair: bool) -> int:
    """Check the weights and each dataset of a store, and print what was found.

    Parameters
    ----------
    store
        The folder ``results/<model>``.
    quick
        Leave out the bytes of embeddings and weights.
    repair
        Quarantine damaged files, so that the next run makes them again.

    Returns
    -------
    The exit code: 0 where nothing is wrong, or all that was is in quarantine.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    problems: list[Problem] = []
    times_said: Counter[str] = Counter()
    for checked in verify(store, quick):
        problems += checked.problems
        for problem in checked.problems:
            what = problem.line.partition(": ")[2]
            times_said[what] += 1
            if times_said[what] <= MAX_IDENTICAL_MESSAGES:
                print(f"lengthwise: error: {problem.line}", file=sys.stderr)
        if not checked.problems:
            print(f"{checked.name}: good" + (f", {checked.note}" if checked.note else ""), flush=True)
    for what, n in times_said.items():
        if n > MAX_IDENTICAL_MESSAGES:
            print(f"lengthwise: error: and {n - MAX_IDENTICAL_MESSAGES:,} more files: {what}", file=sys.stderr)
    mendable = all(problem.path for problem in problems)
    if problems and not repair and any(problem.path for problem in problems):
        print("--repair takes what is damaged out of service; the next run of snakemake makes it again")
    if repair:
        for path in quarantine(problems):
            print(f"out of service: {path}")
        if problems:
            print("run snakemake: it makes again what is gone" + ("" if mendable else "; the rest is yours to mend"))
    return 0 if not problems or (repair and mendable) else 1
