"""Pages in a real browser without a window: Debian's chromium, where it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")


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
