"""Numbers as people say them."""


def count(number: int, noun: str) -> str:
    """1 job, 2 jobs, 3,000 jobs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(number: float) -> str:
    """Bytes as people say them: 42 bytes, 3.1 MB, 2,048 GB."""
    if number < 1000:
        return f"{number:.0f} bytes"
    unit, shown = next(
        ((u, number / n) for u, n in (("kB", 1e3), ("MB", 1e6)) if number < 1000 * n), ("GB", number / 1e9)
    )
    return f"{shown:,.1f} {unit}" if shown < 100 else f"{shown:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 2 h 07 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
