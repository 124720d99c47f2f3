"""`python -m lengthwise progress`: a block that redraws in a terminal, or a line a minute in a log."""

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from lengthwise.jobs.heartbeat import BEAT_SECONDS
from lengthwise.maintain.progress import JobProgress, NoPlanError, RunProgress, read_progress, run_text
from lengthwise.system.text import count, duration

REDRAW_SECONDS = 2.0
LINE_SECONDS = 60.0
BAR_COLUMNS = 60


def run(store: Path, once: bool) -> int:
    """Show the progress of a run until Ctrl-C or its end; returns the exit code."""
    with suppress(KeyboardInterrupt):
        watch(store, once)
    return 0


def watch(store: Path, once: bool = False) -> None:
    """Show the progress of a run: a block in a terminal, a line a minute elsewhere.

    It ends when all jobs of the plan are done and no run is at work, which might replace the plan. Where the file system has
    no locks a run at work is not seen.

    Parameters
    ----------
    store
        The folder ``results/<model>``. While it has no plan, `watch` waits for one.
    once
        Show the progress once and return.

    Raises
    ------
    LengthwiseError
        No run has begun in the store; or there is no plan, none is being made, and `once` is set.
    """
    name, screen = store.resolve().name, _Screen()
    while True:
        try:
            progress = read_progress(store)
        except NoPlanError as error:
            if once and not error.being_made:
                raise
            reason = error.reason if error.being_made else "no plan yet"
            screen.show_waiting(f"{name}: {reason}" if once else f"{name}: {reason}; waiting for it")
            complete, pause_seconds = False, REDRAW_SECONDS
        else:
            screen.show(name, progress)
            complete, pause_seconds = progress.complete, REDRAW_SECONDS if screen.is_terminal else LINE_SECONDS
        if once or complete:
            return
        time.sleep(pause_seconds)


class _Screen:
    """What is printed: in a terminal each state over the one before, elsewhere lines with the time."""

    def __init__(self) -> None:
        self.is_terminal, self.drawn_lines, self.waiting = sys.stdout.isatty(), 0, ""

    def show(self, name: str, progress: RunProgress) -> None:
        self.waiting = ""
        if self.is_terminal:
            columns, rows = shutil.get_terminal_size()
            self._draw(block_text(name, progress, columns - 1, rows - 1))
        else:
            print(f"{time.strftime('%H:%M:%S')}  {line_text(name, progress)}", flush=True)

    def show_waiting(self, line: str) -> None:
        """Show why there is no progress; in a log once."""
        if self.is_terminal:
            self._draw([line])
        elif line != self.waiting:
            print(line, flush=True)
        self.waiting = line

    def _draw(self, lines: list[str]) -> None:
        columns = shutil.get_terminal_size().columns
        erase = f"\x1b[{self.drawn_lines}F\x1b[J" if self.drawn_lines else ""
        print(erase + "\n".join(line[: columns - 1] for line in lines), flush=True)
        self.drawn_lines = len(lines)


def line_text(name: str, progress: RunProgress) -> str:
    """The progress in one line."""
    parts = [_done_text(progress)]
    if progress.run and progress.all_jobs_done:
        parts += [_plan_may_change(progress.run)]
    elif not progress.complete:
        parts += [f"{len(progress.running):,} running"] if progress.running else []
        parts += [_speed_text(progress)]
        parts += [f"{len(progress.stopped):,} stopped without an end"] if progress.stopped else []
    return f"{name}: {', '.join(parts)}"


def block_text(name: str, progress: RunProgress, columns: int, rows: int) -> list[str]:
    """The progress with a bar and a line for each running job, in at most `rows` lines."""
    share = progress.done_residues / progress.total_residues if progress.total_residues else 1.0
    width = min(columns, BAR_COLUMNS)
    filled = int(share * width)
    lines = [f"{name}: {_done_text(progress)}", "█" * filled + "░" * (width - filled)]
    if progress.all_jobs_done:
        return [*lines, _plan_may_change(progress.run) if progress.run else "complete"]
    lines.append(_speed_text(progress))
    job_lines = rows - len(lines) - 2
    shown = progress.running if len(progress.running) <= job_lines else progress.running[: job_lines - 1]
    place_columns = max((len(job.place) for job in shown), default=0)
    lines += [_job_text(job, place_columns) for job in shown]
    if rest := progress.running[len(shown) :]:
        lines.append(f"  and {len(rest):,} more: {sum(job.residues_per_second for job in rest):,.0f} residues/s")
    if progress.stopped:
        last = progress.stopped[0]
        jobs = f"{count(len(progress.stopped), 'job')} stopped without an end"
        age = duration(last.heartbeat_age_seconds)
        lines.append(f"  {jobs}, the last {age} ago: {last.job} on {last.place}")
    return lines


def _job_text(job: JobProgress, place_columns: int) -> str:
    left = f"{duration(job.seconds_left)} left" if job.seconds_left is not None else "starting"
    left = left if job.done_residues < job.total_residues else "finishing"
    age = job.heartbeat_age_seconds
    late = f", last heartbeat {duration(age)} ago" if age > 4 * BEAT_SECONDS else ""
    percent, rate = 100 * job.done_residues / job.total_residues, f"{job.residues_per_second:,.0f} residues/s"
    return f"  {job.place:{place_columns}}  {job.job}  {percent:3.0f} %  {rate}  {left}{late}"


def _plan_may_change(run: dict) -> str:
    return f"{run_text(run)} and may change the plan"


def _done_text(progress: RunProgress) -> str:
    done, total = progress.done_residues, progress.total_residues
    jobs = f"{progress.jobs_done:,} of {count(progress.jobs, 'job')} done"
    return f"{done:,} of {total:,} residues ({100 * done / total if total else 100.0:.1f} %), {jobs}"


def _speed_text(progress: RunProgress) -> str:
    if not progress.running:
        left = f", {duration(progress.seconds_left)} left on one device" if progress.seconds_left else ""
        return f"no job is running{left}"
    speed = f"on {count(len({job.place for job in progress.running}), 'device')}"
    if progress.residues_per_second:
        speed = f"{progress.residues_per_second:,.0f} residues/s {speed}"
    if progress.seconds_left is None:
        return speed
    end = time.strftime("%a %H:%M", time.localtime(time.time() + progress.seconds_left))
    return f"{speed}, {duration(progress.seconds_left)} left, until {end}"
