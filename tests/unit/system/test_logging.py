"""Errors and log lines: one line each, and nothing in them controls the terminal."""

import subprocess
import sys

import pytest

from lengthwise.__main__ import main
from lengthwise.errors import LengthwiseError
from lengthwise.system.logging import error_line
from lengthwise.system.text import printable

# A colour, the terminal's title, C1 codes, a line break, an override of the direction, an undecodable byte.
HOSTILE = "a\x1b[31m\x1b]0;title\x07\x9b2J\r\nb\u202e\udcff"


def controls(text: str) -> list[str]:
    return [letter for letter in text if not letter.isprintable() and letter != "\n"]


def test_what_prints_stays_and_what_does_not_is_escaped():
    assert printable("größe 蛋 C:\\x {}") == "größe 蛋 C:\\x {}"
    assert printable("a\x1b[31mb\n") == r"a\x1b[31mb\n"
    assert printable(printable(HOSTILE)) == printable(HOSTILE)
    assert printable(HOSTILE).isprintable()


def test_an_error_is_one_printable_line():
    line = error_line(LengthwiseError(f"{HOSTILE}: no such file"))
    assert line.isprintable()
    assert line.startswith("lengthwise: error: a\\x1b[31m")


FAILING_RULE = """
import sys
from lengthwise.errors import LengthwiseError
from lengthwise.system.logging import log, reporting
hostile = sys.argv[3].encode().decode("unicode_escape")
with reporting(sys.argv[1]):
    log.info("reading %s", hostile)
    raise {"known": LengthwiseError, "unexpected": ValueError}[sys.argv[2]](hostile)
"""


@pytest.mark.parametrize("error", ["known", "unexpected"])
def test_a_rule_prints_and_logs_no_control_characters(tmp_path, error):
    """In a process of its own, because `reporting` handles its signals."""
    escaped = HOSTILE.encode("unicode_escape").decode()
    command = [sys.executable, "-c", FAILING_RULE, str(tmp_path / "rule.log"), error, escaped]
    printed = subprocess.run(command, stderr=subprocess.PIPE, text=True).stderr
    logged = (tmp_path / "rule.log").read_text()
    for text in (printed, logged):
        assert "reading a\\x1b[31m" in text
        assert controls(text) == []
    assert printed.splitlines()[-1] == logged.splitlines()[-1]
    assert ("Traceback" in logged) == (error == "unexpected")


def test_a_command_prints_no_control_characters(tmp_path, capsys):
    assert main(["verify", str(tmp_path / HOSTILE)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert controls(line) == []
