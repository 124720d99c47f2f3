"""Rounds over the points of the study: the order of the passes, and how many fit into the time.

Another process slows a machine down for moments that last longer than a pass. So each round visits every point, those of
the two engines at one length one after the other, and the shortest pass of a point is its result. A round begins one longer
length of each series: the short passes, which suffer most, are repeated while the long ones are made.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from lengthwise.report.study.schema import OK, OUT_OF_MEMORY, SKIPPED_MEMORY, SKIPPED_TIME

# Passes of a point that the time must suffice for before a longer one starts, and the most that it gets.
MIN_REPEATS, MAX_REPEATS = 2, 20
# A length is settled once so many of each engine's shortest passes differ by less than this share: two slow ones may be alike.
ALIKE, AGREEMENT = 3, 0.05
# The first pass at a length sets up libraries for its shape and is not timed; it takes about this many timed ones.
FIRST_PASS = 1.5


@dataclass(eq=False)
class Point:
    """A length of a series, with what measures it."""

    series: Hashable  # its points differ in length alone
    settles_with: Hashable  # the same for both engines at one length
    operations: int
    first: Callable[[], str]  # warms up and measures memory -> its status
    again: Callable[[], float]  # a timed pass -> its seconds
    seconds: list[float] = field(default_factory=list)  # of the timed passes
    status: str = SKIPPED_TIME


def measure_in_rounds(points: Sequence[Point], seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
    """Fill in `seconds` and `status` of the points.

    A length starts where the time suffices for both engines. One that found no time or no free memory is tried again in
    the next round: a slow pass ends no series. A point's cost is predicted by the shortest pass of its series' longest
    length so far. Where memory ran out, a series ends.

    Parameters
    ----------
    points
        In the order of a round: lengths ascend, and the engines alternate.
    seconds
        Time for all passes. No pass starts whose predicted end lies beyond it.
    clock
        Seconds that ascend.
    """
    ends = clock() + seconds
    same_length: dict[Hashable, list[Point]] = {}
    for point in points:
        same_length.setdefault(point.settles_with, []).append(point)
    worked = True
    while worked:
        worked = False
        stopped: dict[Hashable, str] = {}  # series that go no further in this round, and why
        begun: set[Hashable] = set()  # series that began a length in this round
        per_operation: dict[Hashable, float] = {}
        for point in points:
            left = ends - clock()
            if point.seconds:
                shortest = min(point.seconds)
                per_operation[point.series] = shortest / point.operations
                if shortest > left or _is_settled(same_length[point.settles_with]):
                    continue
            elif point.series in stopped or point.status == OUT_OF_MEMORY:
                why = stopped.setdefault(point.series, OUT_OF_MEMORY)
                if why == SKIPPED_MEMORY:
                    point.status = why
                continue
            elif point.series in begun:
                continue
            else:
                fresh = [p for p in same_length[point.settles_with] if not p.seconds and p.status != OUT_OF_MEMORY]
                unknown = min(per_operation.values(), default=0.0)
                once = sum(per_operation.get(p.series, unknown) * p.operations for p in fresh)
                if left <= 0 or once * (FIRST_PASS + MIN_REPEATS) + _owed_seconds(points) > left:
                    stopped[point.series] = SKIPPED_TIME
                    continue
                begun.add(point.series)
                point.status = point.first()
                if point.status != OK:
                    stopped[point.series] = point.status
                    continue
            point.seconds.append(point.again())
            per_operation[point.series] = min(point.seconds) / point.operations
            worked = True


def _is_settled(points: list[Point]) -> bool:
    """Whether more passes would hardly change the results at a length."""
    timed = [sorted(point.seconds) for point in points if point.seconds]
    if min(map(len, timed)) >= MAX_REPEATS:
        return True
    return all(len(each) >= ALIKE and each[ALIKE - 1] <= (1 + AGREEMENT) * each[0] for each in timed)


def _owed_seconds(points: Sequence[Point]) -> float:
    """The time of the passes that points lack to `MIN_REPEATS`."""
    return sum(min(p.seconds) * max(0, MIN_REPEATS - len(p.seconds)) for p in points if p.seconds)
