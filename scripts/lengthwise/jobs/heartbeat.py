"""Heartbeats: a running job writes its progress to a small file every few seconds."""

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lengthwise.system.files import removed_on_sigterm, temporary

FIRST_BEAT_SECONDS, BEAT_SECONDS = 0.5, 5.0
# The keys that readers of a heartbeat need.
HEARTBEAT_KEYS = {"job", "host", "gpu", "device", "time", "done", "residues", "seconds"}


class Heartbeat:
    """Writes a job's progress to `running/<job>.json`, on a thread of its own.

    Use as a context manager: leaving it removes the file.

    Parameters
    ----------
    store
        The store.
    job
        The job's name.
    device
        The device's name for people.
    progress
        Returns (residues done, residues in total, seconds of work so far).
    """

    def __init__(self, store: Path, job: str, device: str, progress: Callable[[], tuple[int, int, float]]):
        self.path, self.progress = heartbeat_path(store, job), progress
        self.job_facts: dict[str, str | int | None] = {
            "job": job,
            "device": device,
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "host": platform.node(),
            "process": os.getpid(),
        }
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        part = temporary(self.path)
        pause_seconds = min(FIRST_BEAT_SECONDS, BEAT_SECONDS)
        while True:
            done, residues, seconds = self.progress()
            now = {"time": time.time(), "done": done, "residues": residues, "seconds": round(seconds, 3)}
            with removed_on_sigterm(self.path):
                try:
                    part.write_text(json.dumps(self.job_facts | now))
                    os.replace(part, self.path)  # without fsync: a heartbeat is worthless after a power cut
                except OSError:  # a full disk is reported where shards are written
                    part.unlink(missing_ok=True)
            if self.ended.wait(pause_seconds):
                self.path.unlink(missing_ok=True)
                return
            pause_seconds = min(2 * pause_seconds, BEAT_SECONDS)  # short first, so that short jobs are seen too

    def __enter__(self) -> "Heartbeat":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def heartbeat_path(store: Path, job: str) -> Path:
    return store / "running" / f"{job}.json"
