"""Progress of a run: the plan gives the totals, job records the finished jobs, heartbeats the running ones.

A run may replace the plan and remove any of these files at any moment. `progress_command` prints the progress.
"""

import csv
import errno
import json
import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.jobs.heartbeat import HEARTBEAT_KEYS
from lengthwise.plan.jobs_table import job_rows
from lengthwise.system.locks import run_lock_holder

# The job of an older heartbeat was killed. Some network file systems show a file a minute late.
STALE_SECONDS = 120.0
# Finished jobs whose speed stands for that of jobs without one.
RECENT_JOBS = 10
# errno values of a file or folder that was removed or replaced meanwhile. ESTALE: on NFS.
_VANISHED = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


@dataclass(frozen=True)
class JobProgress:
    """A job with a heartbeat and without a job record: it is running, or it was killed."""

    job: str
    place: str  # host and device
    residues_per_second: float
    done_residues: int  # of all its shards, those that an earlier try finished included
    total_residues: int
    seconds_left: float | None  # None before its first residue
    heartbeat_age_seconds: float


@dataclass(frozen=True)
class RunProgress:
    """Progress over all jobs of the plan."""

    done_residues: int
    total_residues: int
    jobs_done: int
    jobs: int
    running: list[JobProgress]
    stopped: list[JobProgress]  # their heartbeats are stale
    residues_per_second: float
    seconds_left: float | None  # on one device where no job is running; None where no speed is known
    run: dict | None = None  # the record of the run at work; it may replace the plan

    @property
    def all_jobs_done(self) -> bool:
        return self.jobs_done == self.jobs

    @property
    def complete(self) -> bool:
        return self.all_jobs_done and self.run is None


class NoPlanError(LengthwiseError):
    """A store has no plan at this moment.

    Attributes
    ----------
    reason
        Why, without the store's path.
    being_made
        Whether a run at work makes the plan, or a trace tells that one makes it or was ended while it did.
    """

    def __init__(self, store: Path, reason: str, being_made: bool):
        super().__init__(f"{store}: {reason}")
        self.reason, self.being_made = reason, being_made


@dataclass(frozen=True)
class _PlannedJob:
    residues: int
    forecast_seconds: float


def plan_table(store: Path) -> Path:
    """The path of a store's plan."""
    return store / "plan" / "jobs.tsv"


def read_progress(store: Path, now: float | None = None) -> RunProgress:
    """Read the progress of a store's run.

    Parameters
    ----------
    store
        The store.
    now
        The time in seconds of the epoch, for the age of heartbeats. The current time by default.

    Raises
    ------
    NoPlanError
        The store has no plan now: none was made yet, or it is being made again.
    LengthwiseError
        No run has begun in the store.
    """
    # Before the plan: a run that ends in between leaves its own plan, not the one before.
    run = run_lock_holder(store)
    jobs, now = _read_plan(store, run), time.time() if now is None else now
    finished = {entry.name.removesuffix(".json") for entry in _json_files(store / "jobs")} & jobs.keys()
    heartbeats = (_read_heartbeat(Path(entry.path)) for entry in _json_files(store / "running"))
    unfinished = [
        _job_progress(heartbeat, jobs[heartbeat["job"]], now)
        for heartbeat in heartbeats
        if heartbeat and heartbeat["job"] in jobs.keys() - finished
    ]
    running = [job for job in unfinished if job.heartbeat_age_seconds <= STALE_SECONDS]
    stopped = [job for job in unfinished if job.heartbeat_age_seconds > STALE_SECONDS]
    return RunProgress(
        done_residues=sum(jobs[job].residues for job in finished) + sum(job.done_residues for job in running),
        total_residues=sum(job.residues for job in jobs.values()),
        jobs_done=len(finished),
        jobs=len(jobs),
        running=sorted(running, key=lambda job: (job.place, job.job)),
        stopped=sorted(stopped, key=lambda job: job.heartbeat_age_seconds),
        residues_per_second=sum(job.residues_per_second for job in running),
        seconds_left=_seconds_left(store, jobs, finished, running),
        run=run,
    )


def run_text(run: dict) -> str:
    """Return a few words on the run at work."""
    return f"the run of {run['began']} on {run['host']} is at work"


def _seconds_left(
    store: Path, jobs: dict[str, _PlannedJob], finished: set[str], running: list[JobProgress]
) -> float | None:
    """Work left over speed, both in forecast seconds because long proteins take longer per residue."""
    work = {job.job: jobs[job.job].forecast_seconds for job in running}
    left = sum(job.forecast_seconds for name, job in jobs.items() if name not in finished)
    left -= sum(work[job.job] * job.done_residues / job.total_residues for job in running)
    all_have_speed = running and all(job.residues_per_second for job in running)
    usual = 0.0 if all_have_speed else _recent_speed(store, jobs, finished)
    speeds = [work[job.job] * job.residues_per_second / job.total_residues or usual for job in running]
    speed = sum(speeds) if running else usual
    last_job = max((job.seconds_left for job in running if job.seconds_left is not None), default=0.0)
    return max(left / speed, last_job) if speed else None


def _recent_speed(store: Path, jobs: dict[str, _PlannedJob], finished: set[str]) -> float:
    """Median of forecast over real seconds of the latest finished jobs; 0 where no record says it."""
    job_records = sorted((store / "jobs" / f"{job}.json" for job in finished), key=_modified_time)
    speeds = []
    for path in job_records[-RECENT_JOBS:]:
        with suppress(OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            job_record = json.loads(path.read_text())
            if job_record["made_residues"]:
                share = job_record["made_residues"] / job_record["residues"]
                seconds = job_record["load_seconds"] + job_record["embed_seconds"]
                speeds.append(jobs[path.stem].forecast_seconds * share / seconds)
    return statistics.median(speeds) if speeds else 0.0


def _modified_time(path: Path) -> float:
    """0 for a job record that a run has removed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_plan(store: Path, run: dict | None) -> dict[str, _PlannedJob]:
    try:
        rows = job_rows(plan_table(store))
        if rows or plan_table(store).read_text().endswith("\n"):  # without rows: a whole header
            # The table rounds a tiny job to 0.000 seconds, which would divide by zero.
            return {
                job: _PlannedJob(int(row["residues"]), max(float(row["forecast_seconds"]), 1e-3))
                for job, row in rows.items()
            }
    except OSError as error:
        if error.errno not in _VANISHED:
            raise
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error):  # cut short
        pass
    raise _no_plan(store, run)


def _no_plan(store: Path, run: dict | None) -> LengthwiseError:
    """The error for a store without a readable plan."""
    plan = plan_table(store)
    if run:
        return NoPlanError(store, f"no plan now: {run_text(run)} and makes one", being_made=True)
    if plan.exists() or (plan.parent / "jobs").is_dir():  # work orders
        reason = "no plan now (plan/jobs.tsv is missing or incomplete): a run makes it, or was ended while it did"
        return NoPlanError(store, reason, being_made=True)
    if plan.parent.is_dir() or (store / "settings.json").exists():
        reason = "no plan here yet (no plan/jobs.tsv); give results/<model> of a run"
        return NoPlanError(store, reason, being_made=False)
    return LengthwiseError(f"{store}: no run has begun here; give results/<model> of one")


def _json_files(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name.endswith(".json") and not entry.name.startswith(".")]
    except OSError as error:
        if error.errno not in _VANISHED:
            raise
        return []


def _read_heartbeat(path: Path) -> dict | None:
    """None where the file has just been removed, or another program wrote it."""
    try:
        heartbeat = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    valid = isinstance(heartbeat, dict) and heartbeat.keys() >= HEARTBEAT_KEYS and _has_types(heartbeat)
    return heartbeat if valid else None


def _has_types(heartbeat: dict) -> bool:
    names = all(isinstance(heartbeat[key], str) for key in ("job", "host", "device"))
    return names and all(isinstance(heartbeat[key], int | float) for key in ("time", "done", "residues", "seconds"))


def _job_progress(heartbeat: dict, job: _PlannedJob, now: float) -> JobProgress:
    done_before = job.residues - heartbeat["residues"]  # by an earlier try; the heartbeat counts this try alone
    rate = heartbeat["done"] / heartbeat["seconds"] if heartbeat["seconds"] > 0 else 0.0
    gpu = f"GPU {heartbeat['gpu']} " if heartbeat["gpu"] else ""
    return JobProgress(
        job=heartbeat["job"],
        place=f"{heartbeat['host']} {gpu}{heartbeat['device']}",
        residues_per_second=rate,
        done_residues=done_before + heartbeat["done"],
        total_residues=job.residues,
        seconds_left=(heartbeat["residues"] - heartbeat["done"]) / rate if rate else None,
        heartbeat_age_seconds=max(now - heartbeat["time"], 0.0),
    )
