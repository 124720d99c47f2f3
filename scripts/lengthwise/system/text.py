"""Numbers and words as text for people."""

import difflib


def count(number: int, noun: str) -> str:
    """Return a number and its noun: 1 job, 2 jobs, 3,000 jobs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(number_bytes: float) -> str:
    """Return bytes with a unit: 42 bytes, 3.1 MB, 2,048 GB."""
    if number_bytes < 1000:
        return f"{number_bytes:.0f} bytes"
    unit, unit_bytes = ("kB", 1e3) if number_bytes < 1e6 else ("MB", 1e6) if number_bytes < 1e9 else ("GB", 1e9)
    number = number_bytes / unit_bytes
    return f"{number:,.1f} {unit}" if number < 100 else f"{number:,.0f} {unit}"


def printable(text: str) -> str:
    """Return text for one line of a terminal: line breaks, escape codes and other characters that do not print are escaped.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def did_you_mean(word: str, known: list[str]) -> str:
    """Return a question that names the known word most like this one, after a space; empty if none is like it."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" did you mean {near[0]!r}?" if near else ""


def duration(seconds: float) -> str:
    """Return seconds with units: 42 s, 3 min 05 s, 2 h 07 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
