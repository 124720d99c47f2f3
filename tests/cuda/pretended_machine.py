"""A machine with a pretended card, for processes that `site` is on the path of."""

import json
from pathlib import Path

from pretend import Card

import driver

SITE = Path(__file__).parent / "site"
VERSION = """
__version__ = "2.13.0{local}"
debug, git_version, hip, rocm, xpu = False, "", None, None, None
cuda = {cuda!r}
"""


def write_machine(folder: Path, card: Card, local: str = "+cu130") -> None:
    """Make its driver, its card and its build of torch: LENGTHWISE_PRETEND and LD_LIBRARY_PATH name the folder."""
    driver.build(folder)
    (folder / "card.json").write_text(json.dumps(vars(card)))
    (folder / "version.py").write_text(VERSION.format(local=local, cuda=card.cuda))
