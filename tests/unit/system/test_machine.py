"""What this machine has."""

import subprocess
import sys

from lengthwise.system.machine import idle_cores, usable_cores


def test_a_busy_core_is_not_idle():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
    try:
        assert 0 <= idle_cores(1.0) < 0.5 * usable_cores()
    finally:
        for process in busy:
            process.kill()
            process.wait()
