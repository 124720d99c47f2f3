"""What a rule says: to the terminal and its log, and of a failure one line."""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lengthwise.errors
from lengthwise.errors import LengthwiseError
from lengthwise.system.files import remove_temporaries

log = logging.getLogger("lengthwise")

FAILED = "lengthwise: error: "


@contextmanager
def reporting(log_file: str, scripts: str) -> Iterator[None]:
    """Run a rule's work: log to the terminal and to `log_file`; a failure becomes one line, with exit code 1.

    A failure that is nobody's mistake but the program's has its traceback in the log. A SIGTERM ends the process at once. Where
    the disk is full there is no log, and the terminal has it all.

    Parameters
    ----------
    log_file
        The rule's log.
    scripts
        The folder of the rule's script: the package must be the one beside it.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    with suppress(OSError):
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(log_file, mode="w"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    _end_at_once_on_sigterm(log_file)
    try:
        _require_own_package(scripts)
        yield
    except KeyboardInterrupt:
        print("lengthwise: interrupted; finished shards are kept", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        line, details = str(error), ""
        if not isinstance(error, LengthwiseError):
            line = f"unexpected {type(error).__name__}: {line.splitlines()[0] if line else ''} (details in {log_file})"
            details = traceback.format_exc()
        _say_why(log_file, line, details)
        sys.exit(1)
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.flush()


class _LogFile(logging.FileHandler):
    """Says nothing of a disk that is full: that would hide what the work says of it."""

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


def _say_why(log_file: str, line: str, details: str = "") -> None:
    """To the terminal first: the log may be on a disk that is full."""
    print(f"{FAILED}{line}", file=sys.stderr, flush=True)
    with suppress(OSError), open(log_file, "a") as file:
        file.write(f"{details}{FAILED}{line}\n")


def _end_at_once_on_sigterm(log_file: str) -> None:
    """Schedulers send it before they kill: whatever the process is in the middle of, a thread of its own ends it.

    Python's own handlers would wait for the main thread to come back from what it computes or loads.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while signal.SIGTERM not in os.read(reading, 1):
            pass
        try:
            _say_why(
                log_file, "ended by SIGTERM: cancelled, preempted or out of time; what is finished is kept, run again"
            )
        finally:
            remove_temporaries()  # last: the main thread would say that its file is gone
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
    signal.set_wakeup_fd(writing)  # written to at once, whatever Python does
    signal.signal(signal.SIGTERM, lambda *_: None)


def _require_own_package(scripts: str) -> None:
    """Another installed version would win over the one beside the workflow, because `scripts` comes last in the path."""
    imported, own = Path(lengthwise.errors.__file__).resolve().parent, Path(scripts).resolve() / "lengthwise"
    if imported != own:
        raise LengthwiseError(
            f"the workflow's package is {own}, but Python imports {imported}: run pip install -e . in the workflow's folder, "
            "or pip uninstall lengthwise"
        )
