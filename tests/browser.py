"""Pages in a real browser without a window: Debian's chromium, where it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")

# A browser without a window is 500 pixels wide at least: a phone is a frame in it.
_FRAME = """
<body style="margin: 0"><iframe src="{page}" width="{width}" height="4000" style="border: 0"></iframe><pre></pre>
<script>addEventListener("message", event => {{ document.querySelector("pre").textContent = event.data; }});</script>
"""


def framed(page: Path, width: int) -> Path:
    """A page that shows another, beside it, as wide as asked, and writes what that one posts."""
    frame = page.with_name(f"frame-{page.stem}-{width}.html")
    frame.write_text(_FRAME.format(page=page.name, width=width))
    return frame


def picture(page: Path, to: Path, width: int, height: int, dark: bool = False) -> Path:
    """A picture of a page's first screens."""
    _run(page, to.parent, f"--window-size={width},{height}", f"--screenshot={to}", dark=dark)
    return to


def rendered(page: Path, width: int = 1280, dark: bool = False) -> str:
    """The page as the browser has it once its scripts have run."""
    return _run(page, page.parent, f"--window-size={width},900", "--dump-dom", dark=dark)


def printed(page: Path, to: Path) -> Path:
    """The page as a PDF."""
    _run(page, to.parent, "--no-pdf-header-footer", f"--print-to-pdf={to}")
    return to


def _run(page: Path, profile: Path, *options: str, dark: bool = False) -> str:
    # The page's own files and nothing else: every host is nowhere.
    always = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    always += [f"--user-data-dir={profile / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    run = subprocess.run([CHROMIUM, *always, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout
