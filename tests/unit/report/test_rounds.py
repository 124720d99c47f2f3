"""Rounds of passes on a clock of the test's own: what other processes do to a pass changes no order of the results."""

import itertools

import numpy as np
import pytest

from lengthwise.esm2.shapes import ModelConfig
from lengthwise.report.study.rounds import ALIKE, MAX_REPEATS, MIN_REPEATS, Point, measure_in_rounds
from lengthwise.report.study.schema import FAIR_ESM, LENGTHWISE, OK, OUT_OF_MEMORY, SKIPPED_MEMORY, SKIPPED_TIME

SHAPE = ModelConfig(6, 320, 20)
LENGTHS = (50, 200, 500, 1000, 2000)
TIMES_AS_LONG = {LENGTHWISE: 1.0, FAIR_ESM: 1.3}


class Machine:
    """A clock that passes move on; `noise()` is how many times as long as on a quiet machine a pass takes."""

    def __init__(self, noise=lambda: 1.0):
        self.now, self.noise, self.passes = 0.0, noise, []

    def point(self, engine, length, n=1, status=OK):
        operations = n * SHAPE.flops(length)
        kind = "single" if n == 1 else "full"
        quiet = TIMES_AS_LONG[engine] * (2e-3 + operations / 150e9)

        def again():
            seconds = quiet * self.noise()
            self.now += seconds
            self.passes.append((engine, kind, length))
            return seconds

        def first():
            if status == OK:
                self.now += quiet * self.noise()
            return status

        return Point((engine, kind), (kind, length), operations, first, again)

    def points(self):
        sizes = [(length, n) for length in LENGTHS for n in (1, 1_000 // length) if n]
        return [self.point(engine, length, n) for length, n in dict.fromkeys(sizes) for engine in TIMES_AS_LONG]

    def measure(self, points, seconds):
        measure_in_rounds(points, seconds, lambda: self.now)
        return points


def shortest(points):
    return {(*point.series, point.settles_with[1]): min(point.seconds) for point in points if point.seconds}


def faster(found, by=1.0):
    """Pairs of points of a series of which the first has more than `by` times the residues per second of the second."""
    rates = {point: point[2] / seconds for point, seconds in found.items()}
    return {(a, b) for a, b in itertools.permutations(rates, 2) if a[:2] == b[:2] and rates[a] > by * rates[b]}


@pytest.mark.parametrize("seed", range(20))
def test_on_a_busy_machine_engines_and_lengths_are_ordered_as_on_a_quiet_one(seed):
    rng = np.random.default_rng(seed)
    busy = Machine(lambda: rng.uniform(1.0, 1.02) if rng.random() < 0.5 else rng.uniform(1.5, 8.0))
    found = shortest(busy.measure(busy.points(), 120.0))
    quiet = Machine()
    expected = shortest(quiet.measure(quiet.points(), 120.0))
    assert found.keys() == expected.keys()
    assert faster(expected, by=1.1) <= faster(found)
    for (engine, kind, length), seconds in found.items():
        assert (engine == LENGTHWISE) == (seconds < 1.15 * expected[LENGTHWISE, kind, length])


def test_engines_take_turns_lengths_ascend_within_a_round_and_each_round_begins_one():
    machine = Machine()
    machine.measure([point for point in machine.points() if point.series[1] == "single"], 60.0)
    rounds = [LENGTHS[max(0, number - ALIKE) : number] for number in range(1, len(LENGTHS) + ALIKE)]
    assert [(engine, length) for engine, _, length in machine.passes] == [
        (engine, length) for lengths in rounds for length in lengths for engine in TIMES_AS_LONG
    ]


def test_slow_passes_of_the_first_round_end_no_series():
    calls = itertools.count()
    machine = Machine(lambda: 20.0 if next(calls) < 20 else 1.0)
    points = machine.measure(machine.points(), 60.0)
    assert {point.status for point in points} == {OK}


def test_on_a_quiet_machine_the_study_ends_early_and_on_a_noisy_one_points_get_more_passes():
    quiet = Machine()
    assert {len(point.seconds) for point in quiet.measure(quiet.points(), 1e6)} == {ALIKE}
    calls = itertools.count()
    noisy = Machine(lambda: 1.1 ** next(calls))  # no two passes are alike
    assert {len(point.seconds) for point in noisy.measure([noisy.point(LENGTHWISE, 50)], 1e9)} == {MAX_REPEATS}


@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.0, 10.0])
def test_both_engines_reach_the_same_length_in_time(seconds):
    machine = Machine()
    points = machine.measure(machine.points(), seconds)
    assert machine.now <= 1.1 * seconds
    reached = [{p.settles_with for p in points if p.seconds and p.series[0] == engine} for engine in TIMES_AS_LONG]
    assert reached[0] == reached[1]
    assert all(len(point.seconds) >= MIN_REPEATS for point in points if point.seconds)
    assert {p.status for p in points if not p.seconds} <= {SKIPPED_TIME}


def test_without_time_nothing_is_measured():
    machine = Machine()
    assert {point.status for point in machine.measure(machine.points(), 0.0)} == {SKIPPED_TIME}
    assert machine.now == 0


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, SKIPPED_MEMORY])
def test_a_series_without_memory_stops_and_the_other_engine_goes_on(status):
    machine = Machine()
    points = [machine.point(LENGTHWISE, length) for length in LENGTHS]
    points += [machine.point(FAIR_ESM, length, status=OK if length < 500 else status) for length in LENGTHS]
    points.sort(key=lambda point: point.settles_with[1])
    machine.measure(points, 60.0)
    found = {engine: [p.status for p in points if p.series[0] == engine] for engine in TIMES_AS_LONG}
    rest = SKIPPED_MEMORY if status == SKIPPED_MEMORY else SKIPPED_TIME
    assert found == {LENGTHWISE: [OK] * 5, FAIR_ESM: [OK, OK, status, rest, rest]}


def test_a_length_that_had_no_memory_is_tried_again():
    machine = Machine()
    point, tries = machine.point(LENGTHWISE, 500), itertools.count()
    point.first = lambda: SKIPPED_MEMORY if next(tries) == 0 else OK
    machine.measure([machine.point(LENGTHWISE, 50), point], 60.0)
    assert (point.status, len(point.seconds)) == (OK, ALIKE)


def test_a_length_that_had_no_memory_is_not_tried_again_without_the_time_for_it():
    machine = Machine()
    short, point, tries = machine.point(LENGTHWISE, 50), machine.point(LENGTHWISE, 8_000), itertools.count()
    point.first = lambda: SKIPPED_MEMORY if next(tries) == 0 else pytest.fail("it was begun")
    point.status = SKIPPED_MEMORY
    machine.measure([short, point], 0.5)  # the long one takes more than one second
    assert point.status == SKIPPED_MEMORY
