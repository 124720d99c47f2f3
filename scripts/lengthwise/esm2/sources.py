"""Where weights come from: the names of models, their addresses, the place of their files."""

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from lengthwise.errors import LengthwiseError

DEMO = "demo"


def require_secure(url: str) -> None:
    """Raise unless a URL is https, or http on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        return
    raise LengthwiseError(f"{url}: weights are downloaded over https only (or from this machine); check weights_url")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# Where fair-esm 2.0.0's own loader takes them from (esm/pretrained.py).
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/fair-esm"


def path_of(model: str, folder: str | Path) -> Path:
    """Where a model's checkpoint is, or will be."""
    return Path(model) if model.endswith(".pt") else Path(folder) / f"{model}.pt"


def record_path(path: Path) -> Path:
    """What a finished download was."""
    return path.with_name(f"{path.name}.json")
