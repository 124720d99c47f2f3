"""`python -m lengthwise progress`: a block that redraws in a terminal, or a line a minute in a log."""

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.jobs.heartbeat import BEAT_SECONDS
from lengthwise.maintain.progress import JobProgress, RunProgress, plan_table, read_progress
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
    """Show the progress of a run until all jobs are done: a block in a terminal, a line a minute elsewhere.

    Parameters
    ----------
    store
        The folder ``results/<model>``. If it has no plan yet, `watch` waits for it.
    once
        Show the progress once and return.

    Raises
    ------
    LengthwiseError
        No run has begun in the store; or there is no plan, and `once` is set.
    """
    name, is_terminal, drawn_lines = store.resolve().name, sys.stdout.isatty(), 0
    if not (plan_table(store).parent.is_dir() or (store / "settings.json").exists()):
        raise LengthwiseError(f"{store}: no run has begun here; give results/<model> of one")
    if not once and not plan_table(store).exists():
        print(f"{name}: no plan yet; waiting for it", flush=True)
        while not plan_table(store).exists():
            time.sleep(REDRAW_SECONDS)
    while True:
        progress = read_progress(store)
        if is_terminal:
            columns, rows = shutil.get_terminal_size()
            lines = [line[: columns - 1] for line in block_text(name, progress, columns - 1, rows - 1)]
            erase = f"\x1b[{drawn_lines}F\x1b[J" if drawn_lines else ""
            print(erase + "\n".join(lines), flush=True)
            drawn_lines = len(lines)
        else:
            print(f"{time.strftime('%H:%M:%S')}  {line_text(name, progress)}", flush=True)
        if once or progress.complete:
            return
        time.sleep(REDRAW_SECONDS if is_terminal else LINE_SECONDS)


def line_text(name: str, progress: RunProgress) -> str:
    """The progress in one line."""
    parts = [_done_text(progress)]
    if not progress.complete:
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
    if progress.complete:
        return [*lines, "complete"]
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
