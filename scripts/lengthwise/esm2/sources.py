"""Sources of weights: the official URL, the allowed URLs, and the paths of checkpoints."""

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from lengthwise.errors import LengthwiseError

DEMO = "demo"


def require_secure(url: str) -> None:
    """Raise LengthwiseError unless a URL is https, or http on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        return
    raise LengthwiseError(f"{url}: weights are downloaded over https only (or from this machine); check weights_url")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# The URL in fair-esm 2.0.0's own loader (esm/pretrained.py).
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/fair-esm"


def path_of(model: str, folder: str | Path) -> Path:
    """The path of a model's checkpoint, whether it exists or not; `model` is a name or the path of a ``.pt``."""
    return Path(model) if model.endswith(".pt") else Path(folder) / f"{model}.pt"


def record_path(path: Path) -> Path:
    """The path of a download's record: its URL, size, time and SHA-256."""
    return path.with_name(f"{path.name}.json")
