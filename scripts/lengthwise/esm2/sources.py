"""Sources of weights: names, paths and ids of models; the files of a checkpoint, their stamp and their identity."""

import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import MODELS
from lengthwise.system.files import sha256, stamp
from lengthwise.system.text import did_you_mean

DEMO = "demo"
# The URL in fair-esm 2.0.0's own loader (esm/pretrained.py).
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/fair-esm"
# The organisation of the six on the Hugging Face hub, under fair-esm's names.
HUB_ORGANISATION = "facebook"
# The names that transformers' save_pretrained gives to its files.
CONFIG, WEIGHTS, INDEX, VOCABULARY = "config.json", "model.safetensors", "model.safetensors.index.json", "vocab.txt"
ADAPTERS = "adapter_config.json"  # of PEFT
_KINDS_OF_FILES = "a fair-esm .pt file, a safetensors file or the folder that transformers wrote"
_PICKLES = (".bin", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Models that people ask for and that are not ESM-2, by what their names have in common.
_OTHER_FAMILIES = {
    r"esm_?1b": "ESM-1b",
    r"esm_?1v": "ESM-1v",
    r"esm_?1_": "ESM-1",
    r"esm_?msa": "the MSA Transformer",
    r"esm_?if": "ESM-IF",
    r"esm_?(c(?![a-z])|cambrian|plusplus|\+\+)": "ESM-C",
    r"esm_?3": "ESM-3",
}


@dataclass(frozen=True)
class HubId:
    """A model on the Hugging Face hub: ``org/name``, and the branch, tag or commit (its main branch if None)."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def is_path(model: str) -> bool:
    """Whether the config's `model` is a file or a folder, rather than a name or an id of the hub.

    ``org/name`` is a file or a folder where there is one, else an id.
    """
    if model == DEMO or model in MODELS:
        return False
    endings = (".pt", ".safetensors", *_PICKLES)
    return model.endswith(endings) or model.startswith(("/", "./", "../")) or os.path.exists(model)


def hub_id(model: str) -> HubId | None:
    """The config's `model` as an id of the hub, ``org/name`` or ``org/name@revision``; None if it is none."""
    found = _HUB_ID.fullmatch(model)
    return HubId(found["id"], found["revision"]) if found and not is_path(model) else None


def require_model(model: str) -> None:
    """Raise LengthwiseError unless `model` is a name, an id of the hub, or the path of a checkpoint of a kind that is read."""
    if is_path(model):
        require_checkpoint(model)
    elif model not in (DEMO, *MODELS) and hub_id(model) is None:
        if family := other_family(model):
            raise LengthwiseError(f"{model!r} {not_served(family)}")
        raise LengthwiseError(
            f"{model!r} is not a model;{did_you_mean(model, [DEMO, *MODELS])} give one of {', '.join([DEMO, *MODELS])}, "
            f"an id of the Hugging Face hub (org/name), or the path of {_KINDS_OF_FILES}"
        )


def require_checkpoint(model: str) -> None:
    """Raise LengthwiseError unless a path is one of a checkpoint: there, and not of a kind that is refused."""
    if model.endswith(_PICKLES):
        raise LengthwiseError(f"{model}: {no_pickles(str(Path(model).parent))}")
    if not os.path.exists(model):
        raise LengthwiseError(f"there is no file or folder {model}")
    if os.path.isdir(model) or model.endswith(".safetensors"):
        weight_files(Path(model))
    elif not model.endswith(".pt"):
        folder = Path(model).parent
        way_out = f"the folder {folder}, which it is in" if (folder / CONFIG).exists() else _KINDS_OF_FILES
        raise LengthwiseError(f"{model}: holds no weights; give {way_out}")


def other_family(name: str) -> str:
    """The family of a model that is not ESM-2, by its name; empty if the name does not tell."""
    name = name.lower().replace("-", "_")
    return next((family for pattern, family in _OTHER_FAMILIES.items() if re.search(pattern, name)), "")


def not_served(family: str) -> str:
    """A clause on a model of another family."""
    return f"is {family}, which is not served yet; Lengthwise embeds with ESM-2 and models of its architecture"


def require_all_layers(path: Path, names: Iterable[str], prefix: str, num_layers: int, key: str) -> None:
    """Raise LengthwiseError if a checkpoint has tensors of more layers than `key` says: it would be read as a shorter model.

    The names of a layer's tensors begin with `prefix` and the layer's number.
    """
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    found = 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)
    if found > num_layers:
        raise LengthwiseError(
            f"{path}: {key} is {num_layers}, but the weights have {found} layers; correct it ('layers' in the config chooses "
            "which of a model's layers are stored)"
        )


def require_feed_forward(path: Path, width: int, embed_dim: int) -> None:
    """Raise LengthwiseError if the feed-forward part of a model is not 4 times as wide as its embeddings."""
    if width != 4 * embed_dim:
        raise LengthwiseError(
            f"{path}: intermediate_size is {width}; another one than 4 x hidden_size ({4 * embed_dim}) is not served yet"
        )


def no_pickles(model: str) -> str:
    """A clause on weights that are there as a pickle alone, and the way out."""
    return (
        "a pickle (.bin), which can run code when it is opened, is not read; save it as safetensors where you trust it: "
        f"python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{model}').save_pretrained('FOLDER')\", "
        "and give that folder as 'model'"
    )


NO_ADAPTERS = (
    "PEFT's adapters without the model; merge them, save that (merge_and_unload().save_pretrained('FOLDER')), and give that "
    "folder as 'model'"
)


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


def path_of(model: str, folder: str | Path) -> Path:
    """The path of a model's checkpoint, whether it exists or not; `model` is a name or a path.

    A named one lies in `folder`, or where torch.hub has downloaded it for fair-esm.
    """
    if is_path(model):
        return Path(model)
    own, downloaded = Path(folder) / f"{model}.pt", torch_hub_folder() / f"{model}.pt"
    return downloaded if model in MODELS and not own.exists() and downloaded.exists() else own


def torch_hub_folder() -> Path:
    """Where torch.hub keeps what it downloads (https://docs.pytorch.org/docs/stable/hub.html)."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return Path(os.path.expanduser(home), "hub", "checkpoints")


def record_path(path: Path) -> Path:
    """The path of a download's record: its URL, size, time and SHA-256."""
    return path.with_name(f"{path.name}.json")


def config_path(path: Path) -> Path:
    """config.json of a safetensors checkpoint, which is a folder or a file."""
    return (path if path.is_dir() else path.parent) / CONFIG


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint that hold its tensors: itself, or those of a folder, in the order of their names.

    Raises
    ------
    LengthwiseError
        A folder without safetensors; an index that is damaged, or that names a file which is not there.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    if (path / INDEX).exists():
        names = indexed(path / INDEX)
    elif (path / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickles = sorted(file.name for file in path.iterdir() if file.name.endswith(_PICKLES))
        if (path / ADAPTERS).exists():
            why = NO_ADAPTERS
        elif pickles:
            why = f"its weights are {pickles[0]}; {no_pickles(str(path))}"
        else:
            why = f"no {WEIGHTS} and no {INDEX} in this folder, as transformers' save_pretrained writes them"
        raise LengthwiseError(f"{path}: {why}")
    if missing := [name for name in names if not (path / name).is_file()]:
        raise LengthwiseError(f"{path}: {missing[0]}, which {INDEX} names, is missing")
    return [path / name for name in names]


def indexed(index: Path) -> list[str]:
    """The names of the safetensors files that an index lists.

    Raises
    ------
    LengthwiseError
        It is damaged, or names what is no file beside it.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError("its weight_map should name safetensors files in this folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise LengthwiseError(f"{index}: no index of a safetensors checkpoint ({reason})") from error
    return names


def weights_stamp(path: Path) -> dict[str, int]:
    """`lengthwise.system.files.stamp` of a checkpoint; of several files the sum of bytes and the latest times."""
    stamps = [stamp(file) for file in weight_files(path)]
    latest = {key: max(one[key] for one in stamps) for key in ("mtime_ns", "ctime_ns")}
    return {"bytes": sum(one["bytes"] for one in stamps), **latest}


def file_sha256(path: Path) -> dict[Path, str]:
    """{file of a checkpoint: its SHA-256}"""
    return {file: sha256(file) for file in weight_files(path)}


def identity(checksums: dict[Path, str]) -> str:
    """The SHA-256 that identifies a checkpoint: its file's, or of several files that of their listing by sha256sum.

    In a shell: ``sha256sum model-*.safetensors | sha256sum``.
    """
    if len(checksums) == 1:
        return next(iter(checksums.values()))
    listing = "".join(f"{checksum}  {file.name}\n" for file, checksum in checksums.items())
    return hashlib.sha256(listing.encode()).hexdigest()
