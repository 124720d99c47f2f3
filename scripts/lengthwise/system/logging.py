"""A rule's log: messages to the terminal and a file, and a failure as one line."""

import faulthandler
import json
import logging
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.system.extras import named_extras
from lengthwise.system.files import discard, remove_temporaries, removed_on_sigterm
from lengthwise.system.slurm import job_number
from lengthwise.system.text import printable

log = logging.getLogger("lengthwise")
ERROR_PREFIX = "lengthwise: error: "
SIGTERM_LINE = (
    f"{ERROR_PREFIX}ended by SIGTERM: cancelled, preempted or out of time; what is finished is kept, run again"
)


def error_line(error: object) -> str:
    """The line of an error, for a terminal or a log. Names and contents of files in it cannot control the terminal."""
    return f"{ERROR_PREFIX}{printable(str(error))}"


@contextmanager
def reporting(log_file: str) -> Iterator[None]:
    """Run a rule's work: log to the terminal and to `log_file`, and turn an exception into one line and exit code 1.

    An unexpected exception also writes its traceback into the log, and a crash of native code the stack. A SIGTERM ends the
    process at once. If the disk is full, only the terminal gets the messages. A process that is killed leaves its
    `running_mark`.

    Parameters
    ----------
    log_file
        Path of the rule's log.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    mark = running_mark(Path(log_file))
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(written := _LogFile(log_file, mode="w"))
        faulthandler.enable(written.stream or sys.stderr, all_threads=False)
        with removed_on_sigterm(mark):
            mark.write_text(json.dumps({"host": platform.node(), "slurm_job": job_number()}))
    for handler in handlers:
        handler.setFormatter(_OneLine("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    _exit_on_sigterm(log_file)
    try:
        with named_extras():
            yield
    except KeyboardInterrupt:
        print("lengthwise: interrupted; finished shards are kept", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        line, details = str(error), ""
        if not isinstance(error, LengthwiseError):
            line = f"unexpected {type(error).__name__}: {line.splitlines()[0] if line else ''} (details in {log_file})"
            details = "".join(f"{printable(line)}\n" for line in traceback.format_exc().splitlines())
        _report_error(log_file, error_line(line), details)
        sys.exit(1)
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.flush()
        discard(mark)


def running_mark(log_file: Path) -> Path:
    """The file beside a rule's log while its process works: JSON with the host and the SLURM job.

    The process removes it at any end but a kill or a crash.
    """
    return log_file.with_name(f".{log_file.name}.running")


class _OneLine(logging.Formatter):
    """A message as one line: ids and names of files in it cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """Ignores errors of writing the log: on a full disk they would hide the error of the work itself."""

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def _report_error(log_file: str, line: str, details: str = "") -> None:
    """Print the error to the terminal first: the log may be on a full disk."""
    print(line, file=sys.stderr, flush=True)
    with suppress(OSError), open(log_file, "a") as file:
        file.write(f"{details}{line}\n")


def _exit_on_sigterm(log_file: str) -> None:
    """Start a thread that ends the process on SIGTERM, which schedulers send before they kill.

    A Python signal handler would wait until the main thread returns from native code.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while signal.SIGTERM not in os.read(reading, 1):
            pass
        try:
            _report_error(log_file, SIGTERM_LINE)
        finally:
            remove_temporaries()  # last: the main thread could fail on a removed file and report that
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
    signal.set_wakeup_fd(writing)  # the C-level handler writes the signal number to this pipe at once
    signal.signal(signal.SIGTERM, lambda *_: None)
