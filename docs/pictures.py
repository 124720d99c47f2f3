"""The pictures of the pages, from a store's own report: `python docs/pictures.py results/demo`.

A report whose scaling study had some minutes shows more: `snakemake --cores 4 --config scaling_seconds=300 --forcerun scaling`.
Needs chromium and Pillow, which matplotlib brings.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent / "pictures"
MAX_BYTES = 200_000
WIDTH = 560  # of a figure, in pixels
FIGURES = ("scaling_memory", "no_grad", "half_precision")
# Name, width and height of the window, dark or not.
SCREENS = [("report", 1280, 900, False), ("report-dark", 1280, 900, True)]


def main(store: Path) -> None:
    """Write every picture anew."""
    report = store.resolve() / "report"
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, width, height, dark in SCREENS:
            screen = Path(folder) / f"{name}.png"
            take(report / "index.html", screen, width, height, dark)
            save(Image.open(screen), name)
    for name in FIGURES:
        figure = Image.open(report / f"{name}.png")
        save(figure.resize((WIDTH, round(WIDTH * figure.height / figure.width)), Image.Resampling.LANCZOS), name)


def take(page: Path, to: Path, width: int, height: int, dark: bool) -> None:
    """A picture of the first screen of a page, as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no chromium here: apt-get install chromium")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={to.parent / 'profile'}"]
    run = [browser, *options, f"--screenshot={to}", page.as_uri()]
    subprocess.run(run, check=True, capture_output=True, timeout=120)


def save(picture: Image.Image, name: str) -> None:
    """Write a PNG of at most 200 kB, in fewer colours if need be."""
    path = HERE / f"{name}.png"
    for colours in (256, 64, 32):
        picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return
    sys.exit(f"{path}: more than {MAX_BYTES:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
