"""Progress: how far a run is over all its jobs, seen from beside it; each running job says so in a small file.

The totals are the plan's, a job is done when its commit is there, and what running jobs did so far is in their heartbeats.
"""

import csv
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.jobs.heartbeat import BEAT_SECONDS, HEARTBEAT_KEYS
from lengthwise.system.text import count, duration

# A heartbeat older than this is that of a job that was killed: some network file systems show files a minute late.
STALE_SECONDS = 120.0

REDRAW_SECONDS = 2.0

LINE_SECONDS = 60.0

RECENT_JOBS = 10


@dataclass(frozen=True)
class Running:
    """A job that is at work, or was when it was last heard of."""

    job: str
    place: str
    residues_per_second: float
    done: int  # residues, those that an earlier try finished with them
    total: int
    seconds_left: float | None
    heard: float  # seconds ago


@dataclass(frozen=True)
class State:
    """How far a run is."""

    done: int  # residues
    total: int
    jobs_done: int
    jobs: int
    running: list[Running]
    silent: list[Running]  # killed, or cut off
    residues_per_second: float
    seconds_left: float | None  # of one device where no job is running; None where no rate is known

    @property
    def complete(self) -> bool:
        return self.jobs_done == self.jobs


def look(store: Path, now: float | None = None) -> State:
    """How far the run of a store's plan is.

    Parameters
    ----------
    store
        The store.
    now
        Seconds of the epoch, against which the age of a heartbeat is taken.

    Raises
    ------
    LengthwiseError
        There is no plan.
    """
    jobs, now = _planned(store), time.time() if now is None else now
    committed = {entry.name.removesuffix(".json") for entry in _entries(store / "jobs")} & jobs.keys()
    beats = [
        beat for entry in _entries(store / "running") if (beat := _read(Path(entry.path), jobs.keys() - committed))
    ]
    told = [(_running(beat, jobs[beat["job"]], now), jobs[beat["job"]]["seconds"]) for beat in beats]
    running = sorted((r for r, _ in told if r.heard <= STALE_SECONDS), key=lambda r: (r.place, r.job))
    silent = sorted((r for r, _ in told if r.heard > STALE_SECONDS), key=lambda r: r.heard)
    # Long proteins take longer: what is left is counted in forecast seconds, and so is how fast they pass.
    alive = [(r, forecast) for r, forecast in told if r.heard <= STALE_SECONDS]
    left = sum(job["seconds"] for name, job in jobs.items() if name not in committed)
    left -= sum(forecast * r.done / r.total for r, forecast in alive)
    usual = 0.0 if alive and all(r.residues_per_second for r, _ in alive) else _usual_pace(store, jobs, committed)
    pace = sum(forecast * r.residues_per_second / r.total or usual for r, forecast in alive) if alive else usual
    last = max((r.seconds_left for r in running if r.seconds_left is not None), default=0.0)
    return State(
        done=sum(jobs[job]["residues"] for job in committed) + sum(r.done for r in running),
        total=sum(job["residues"] for job in jobs.values()),
        jobs_done=len(committed),
        jobs=len(jobs),
        running=running,
        silent=silent,
        residues_per_second=sum(r.residues_per_second for r in running),
        seconds_left=max(left / pace, last) if pace else None,
    )


def watch(store: Path, once: bool = False) -> None:
    """Show how far a run is, until it is complete: a block that redraws in a terminal, a line a minute elsewhere.

    Waits for the plan of a store that has none yet.

    Raises
    ------
    LengthwiseError
        No run has begun in the store; or there is no plan, and `once`.
    """
    name, block, drawn = store.resolve().name, sys.stdout.isatty(), 0
    if not (_plan(store).parent.is_dir() or (store / "settings.json").exists()):
        raise LengthwiseError(f"{store}: no run has begun here; give results/<model> of one")
    if not once and not _plan(store).exists():
        print(f"{name}: no plan yet; waiting for it", flush=True)
        while not _plan(store).exists():
            time.sleep(REDRAW_SECONDS)
    while True:
        state = look(store)
        if block:
            columns, rows = shutil.get_terminal_size()
            lines = [line[: columns - 1] for line in block_of(name, state, columns - 1, rows - 1)]
            up = f"\x1b[{drawn}F\x1b[J" if drawn else ""
            print(up + "\n".join(lines), flush=True)
            drawn = len(lines)
        else:
            print(f"{time.strftime('%H:%M:%S')}  {line_of(name, state)}", flush=True)
        if once or state.complete:
            return
        time.sleep(REDRAW_SECONDS if block else LINE_SECONDS)


def line_of(name: str, state: State) -> str:
    """All of it in one line."""
    parts = [_done(state)]
    if not state.complete:
        parts += [f"{len(state.running):,} running", _speed(state)] if state.running else [_speed(state)]
        parts += [f"{len(state.silent):,} stopped without an end"] if state.silent else []
    return f"{name}: {', '.join(parts)}"


def block_of(name: str, state: State, columns: int, rows: int) -> list[str]:
    """The same, with a bar and a line for each running job, in at most so many lines."""
    share = state.done / state.total if state.total else 1.0
    filled = int(share * min(columns, 60))
    lines = [f"{name}: {_done(state)}", "█" * filled + "░" * (min(columns, 60) - filled)]
    if state.complete:
        return [*lines, "complete"]
    lines.append(_speed(state))
    room = rows - len(lines) - 2
    shown = state.running if len(state.running) <= room else state.running[: room - 1]
    width = max((len(r.place) for r in shown), default=0)
    for r in shown:
        left = f"{duration(r.seconds_left)} left" if r.seconds_left is not None else "begins"
        left = left if r.done < r.total else "closes"
        late = f", last heard of {duration(r.heard)} ago" if r.heard > 4 * BEAT_SECONDS else ""
        share, rate = 100 * r.done / r.total, f"{r.residues_per_second:,.0f} residues/s"
        lines.append(f"  {r.place:{width}}  {r.job}  {share:3.0f} %  {rate}  {left}{late}")
    if rest := state.running[len(shown) :]:
        lines.append(f"  and {len(rest):,} more: {sum(r.residues_per_second for r in rest):,.0f} residues/s")
    if state.silent:
        last = state.silent[0]
        many = f"{count(len(state.silent), 'job')} stopped without an end"
        lines.append(f"  {many}, the last {duration(last.heard)} ago: {last.job} on {last.place}")
    return lines


def _done(state: State) -> str:
    percent = 100 * state.done / state.total if state.total else 100.0
    return f"{state.done:,} of {state.total:,} residues ({percent:.1f} %), {state.jobs_done:,} of {count(state.jobs, 'job')} done"


def _speed(state: State) -> str:
    if not state.running:
        left = f", {duration(state.seconds_left)} left on one device" if state.seconds_left else ""
        return f"no job is running{left}"
    rate = f"on {count(len({r.place for r in state.running}), 'device')}"
    if state.residues_per_second:
        rate = f"{state.residues_per_second:,.0f} residues/s {rate}"
    if state.seconds_left is None:
        return rate
    ends = time.strftime("%a %H:%M", time.localtime(time.time() + state.seconds_left))
    return f"{rate}, {duration(state.seconds_left)} left, until {ends}"


def _plan(store: Path) -> Path:
    return store / "plan" / "jobs.tsv"


def _usual_pace(store: Path, jobs: dict[str, dict], committed: set[str]) -> float:
    """Forecast seconds a second of the jobs that were finished last, for those that have no rate of their own yet."""
    job_records = sorted((store / "jobs" / f"{job}.json" for job in committed), key=_time_of)
    paces = []
    for path in job_records[-RECENT_JOBS:]:
        with suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            job_record = json.loads(path.read_text())
            if job_record["made_residues"]:
                share = job_record["made_residues"] / job_record["residues"]
                paces.append(
                    jobs[path.stem]["seconds"] * share / (job_record["load_seconds"] + job_record["embed_seconds"])
                )
    return statistics.median(paces) if paces else 0.0


def _time_of(path: Path) -> float:
    """When a commit was made; one that a run withdrew meanwhile is long ago."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _planned(store: Path) -> dict[str, dict]:
    """{job: its residues and forecast seconds} of the plan."""
    try:
        with open(_plan(store)) as table:
            rows = list(csv.DictReader(table, delimiter="\t"))
    except FileNotFoundError as error:
        raise LengthwiseError(f"{store}: no plan here yet (no plan/jobs.tsv); give results/<model> of a run") from error
    # A job of next to nothing has 0.000 forecast seconds in the table.
    return {
        row["job"]: {"residues": int(row["residues"]), "seconds": max(float(row["forecast_seconds"]), 1e-3)}
        for row in rows
    }


def _entries(folder: Path) -> list[os.DirEntry]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name.endswith(".json") and not entry.name.startswith(".")]


def _read(path: Path, jobs: set[str]) -> dict | None:
    """A heartbeat, if it is of one of these jobs; it may go, or be somebody's odd file."""
    try:
        beat = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    told = isinstance(beat, dict) and beat.keys() >= HEARTBEAT_KEYS
    return beat if told and path.stem in jobs else None


def _running(beat: dict, job: dict, now: float) -> Running:
    """What a heartbeat says; residues of shards that an earlier try finished are done too."""
    kept = job["residues"] - beat["residues"]
    rate = beat["done"] / beat["seconds"] if beat["seconds"] > 0 else 0.0
    return Running(
        job=beat["job"],
        place=f"{beat['host']} {'GPU ' + beat['gpu'] + ' ' if beat['gpu'] else ''}{beat['device']}",
        residues_per_second=rate,
        done=kept + beat["done"],
        total=job["residues"],
        seconds_left=(beat["residues"] - beat["done"]) / rate if rate else None,
        heard=max(now - beat["time"], 0.0),
    )


def run(store: Path, once: bool) -> int:
    """Show how far a run is; Ctrl-C ends the looking, not the run."""
    with suppress(KeyboardInterrupt):
        watch(store, once)
    return 0
