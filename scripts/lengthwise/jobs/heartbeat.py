"""Heartbeats: each running job says every few seconds how far it is, in a small file."""

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lengthwise.system.files import removed_on_sigterm, temporary

FIRST_BEAT_SECONDS, BEAT_SECONDS = 0.5, 5.0

HEARTBEAT_KEYS = {"job", "host", "gpu", "device", "time", "done", "residues", "seconds"}  # of a heartbeat, what is read


class Heartbeat:
    """Says every few seconds how far a job is, in a file beside the commits; a thread does, whatever the job is at.

    Use as a context manager: on leaving the file goes.

    Parameters
    ----------
    store
        The store.
    job
        The job's name.
    device
        What it computes on, as people call it.
    state
        Gives (residues done, residues to do, seconds that it took so far).
    """

    def __init__(self, store: Path, job: str, device: str, state: Callable[[], tuple[int, int, float]]):
        self.path, self.state = heartbeat_path(store, job), state
        self.known = {"job": job, "device": device, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
        self.known |= {"host": platform.node(), "process": os.getpid()}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        part = temporary(self.path)
        pause = min(FIRST_BEAT_SECONDS, BEAT_SECONDS)
        while True:
            done, residues, seconds = self.state()
            now = {"time": time.time(), "done": done, "residues": residues, "seconds": round(seconds, 3)}
            with removed_on_sigterm(self.path):
                try:
                    part.write_text(json.dumps(self.known | now))
                    os.replace(part, self.path)  # not synced: it is of no use after a power cut
                except OSError:  # a full disk is the shards' business
                    part.unlink(missing_ok=True)
            if self.ended.wait(pause):
                self.path.unlink(missing_ok=True)
                return
            pause = min(2 * pause, BEAT_SECONDS)  # a short job has something to say before it ends

    def __enter__(self) -> "Heartbeat":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def heartbeat_path(store: Path, job: str) -> Path:
    return store / "running" / f"{job}.json"
