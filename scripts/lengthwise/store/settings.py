"""A store's settings: what makes two embeddings comparable.

The first run resolves `auto` and writes settings.json. Every later run compares its config with them.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.shapes import MODELS, ModelConfig
from lengthwise.esm2.sources import file_sha256, identity, is_path, weights_stamp
from lengthwise.esm2.tensors import OF_ROWS, OUTPUTS
from lengthwise.system.files import read_json, write_json

SCHEMA = 1
# Raise it when the engine's numbers change by more than rounding. Embeddings of different numerics must not mix.
NUMERICS = 1
# The settings in the fingerprint. A config that changes one of them does not fit the store.
COMPARABLE = ("weights_sha256", "layers", "precision", "storage_dtype", "outputs", "numerics")
# The outputs that a protein in windows can have: its rows are joined from the windows', and the others are of its rows.
WINDOWED_OUTPUTS = ("residue", *OF_ROWS)
# Likewise, where contacts are an output.
OF_CONTACTS = ("contacts_max_residues", "contact_regression_sha256")
# The outputs that each export needs in the store.
EXPORT_OUTPUTS = {"h5": ("residue", "mean"), "pt": (), "biotrainer": ("residue", "mean"), "parquet": ("mean",)}

_TYPES = {
    "schema": int,
    "model": str,
    "weights_sha256": str,
    "layers": list,
    "precision": str,
    "storage_dtype": str,
    "outputs": list,
    "numerics": int,
    "device": str,
    "num_layers": int,
    "embed_dim": int,
    "attention_heads": int,
    "random_weights": bool,
    "fingerprint": str,
}


def shape_of(settings: dict) -> ModelConfig:
    """The shape of a store's model."""
    return ModelConfig(settings["num_layers"], settings["embed_dim"], settings["attention_heads"])


def resolve_layers(layers: list[int], num_layers: int, key: str = "config: layers") -> list[int]:
    """Absolute layer indices without repeats, in the given order. Negative indices count from the last layer.

    Raises
    ------
    LengthwiseError
        The model does not have one of the layers; the error names `key`.
    """
    for layer in layers:
        if not -num_layers - 1 <= layer <= num_layers:
            raise LengthwiseError(
                f"{key}: {layer} does not exist; the model has layers 0 to {num_layers}, or {-num_layers - 1} to -1"
            )
    return list(dict.fromkeys(int(layer) % (num_layers + 1) for layer in layers))


def order_layers(config: dict, num_layers: int) -> list[int]:
    """The layers to store: the one that reading and exports give by themselves, then the others from the highest down.

    Earlier versions kept the config's order. In every store the first one is the default.

    Raises
    ------
    LengthwiseError
        The model does not have one of the layers, or `default_layer` is not among `layers`.
    """
    layers = sorted(resolve_layers(config["layers"], num_layers), reverse=True)
    default = _default_layer(config, num_layers)
    if default is None:
        return layers
    if default not in layers:
        raise LengthwiseError(
            f"config: default_layer: {config['default_layer']} is not stored; 'layers' gives {_format_value(layers)}: "
            "add it there, or leave default_layer out"
        )
    return [default, *(layer for layer in layers if layer != default)]


def _default_layer(config: dict, num_layers: int) -> int | None:
    """The config's `default_layer` as an absolute index; None for auto."""
    asked = config["default_layer"]
    return None if asked == "auto" else resolve_layers([asked], num_layers, "config: default_layer")[0]


def make(config: dict, weights: dict, auto_device: str) -> dict:
    """The settings of a new store.

    Parameters
    ----------
    config
        The checked config.
    weights
        The receipt of `lengthwise.esm2.download.fetch`.
    auto_device
        The device that `device: auto` stands for, see `lengthwise.system.gpus.auto_device`.
    """
    device = config["device"] if config["device"] != "auto" else auto_device
    precision = config["precision"]
    if precision == "auto":
        precision = "float16" if device == "cuda" else "float32"
    settings = {
        "schema": SCHEMA,
        "model": config["model"],
        "weights_sha256": weights["sha256"],
        "layers": order_layers(config, weights["num_layers"]),
        "precision": precision,
        "storage_dtype": config["storage_dtype"],
        "outputs": [output for output in OUTPUTS if output in config["outputs"]],
        "numerics": NUMERICS,
        "device": device,
        "num_layers": weights["num_layers"],
        "embed_dim": weights["embed_dim"],
        "attention_heads": weights["attention_heads"],
        "random_weights": weights["random_weights"],
        "inv_freq": weights.get("inv_freq", "file"),
    }
    if "contacts" in config["outputs"]:
        settings["contacts_max_residues"] = config["contacts_max_residues"]
        settings["contact_regression_sha256"] = weights.get("contact_regression_sha256", "")
    return {**settings, "fingerprint": fingerprint(settings)}


def fingerprint(settings: dict) -> str:
    """SHA-256, in hex, of the settings in `comparable`. The order of layers has no influence."""
    values = {key: settings[key] for key in comparable(settings)} | {"layers": sorted(settings["layers"])}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def comparable(settings: dict) -> tuple[str, ...]:
    """The settings in the fingerprint."""
    return (*COMPARABLE, *OF_CONTACTS) if "contacts" in settings["outputs"] else COMPARABLE


def find_fault(settings: dict) -> str:
    """What is wrong with settings read from a file, in a few words; empty if nothing is."""
    try:
        if settings["fingerprint"] != fingerprint(settings):
            return "edited by hand"
        wrong = [key for key, expected in _TYPES.items() if type(settings[key]) is not expected]
    except (KeyError, TypeError) as error:
        return f"damaged ({error})"
    if not wrong and not (
        settings["embed_dim"] > 0 and set(settings["layers"]) <= {*range(settings["num_layers"] + 1)}
    ):
        wrong = ["layers"]
    return f"damaged ({wrong[0]} is {str(settings[wrong[0]])[:40]!r})" if wrong else ""


def load(store: Path) -> dict | None:
    """A store's settings, or None if there is no store yet: settings.json or, if it is gone or damaged, a copy.

    Every manifest and plan/inputs.json have a copy.

    Raises
    ------
    LengthwiseError
        The file is of a newer version; or it and all copies are gone or damaged.
    """
    own = Path(store) / "settings.json"
    fault = "is gone"
    if own.exists():
        settings, fault = _read(own)
        if not fault:
            return settings
    for path in (Path(store) / "plan" / "inputs.json", *sorted(Path(store).glob("datasets/*/manifest.json"))):
        if path.exists():
            settings, fault_there = _read(path, "settings")
            if not fault_there:
                return settings
    if has_embedding(store):
        raise LengthwiseError(f"{own}: {fault}; put it back, or use another 'results'")
    return None


def _read(path: Path, key: str = "") -> tuple[dict, str]:
    """Settings in a JSON file, under a key if one is given; and what is wrong with them, empty if nothing is.

    Raises
    ------
    LengthwiseError
        They are of a newer version.
    """
    try:
        content = read_json(path)
    except LengthwiseError as error:
        return {}, str(error).removeprefix(f"{path}: ").split(";")[0]
    settings = content.get(key) if key else content
    if not isinstance(settings, dict):
        return {}, "damaged (settings is not an object)"
    if type(settings.get("schema")) is int and settings["schema"] > SCHEMA:
        raise LengthwiseError(f"{path}: written by a newer Lengthwise (schema {settings['schema']}); update this one")
    return settings, find_fault(settings)


def has_embedding(store: Path) -> bool:
    """Whether a store holds any embedding: from then on its settings are bound."""
    return any(next(Path(store).glob(pattern), None) for pattern in ("shards/*/*.safetensors", "jobs/*.json"))


def require(store: Path) -> dict:
    """A store's settings.

    Raises
    ------
    LengthwiseError
        There are none, or they are damaged or of a newer version.
    """
    settings = load(store)
    if settings is None:
        raise LengthwiseError(f"{store}/settings.json is gone; run snakemake --forcerun fetch_model")
    return settings


def require_same(store: Path, settings: dict) -> None:
    """Refuse to add an embedding of these settings to a store that has others by now, or none.

    Until the first embedding is there, a later run may have taken other settings while a job of a killed run was at work.

    Raises
    ------
    LengthwiseError
        The store's settings are others.
    """
    stored = load(store)
    if stored is None or stored["fingerprint"] != settings["fingerprint"]:
        raise LengthwiseError(
            f"{store}: a later run has taken other settings; this job's embeddings are not needed any more"
        )


def expected(store: Path, config: dict, auto_device: str) -> dict:
    """A store's settings; of a new store, the settings that a run will write, without reading the weights.

    Parameters
    ----------
    store, config, auto_device
        As for `create_or_check`. The config names a known model, or the store has its weights.json.
    """
    if stored := guard(store, config):
        return stored
    if config["model"] in MODELS:
        shape = MODELS[config["model"]]
        known = {key: getattr(shape, key) for key in ("num_layers", "embed_dim", "attention_heads")}
        return make(config, known | {"sha256": "", "random_weights": False}, auto_device)
    return make(config, read_json(Path(store) / "weights.json"), auto_device)


def device_of(store: Path, asked: str) -> str:
    """The device to use for the config's `device`; `auto` stands for the store's."""
    return require(store)["device"] if asked == "auto" else asked


def guard(store: Path, config: dict, weights: dict | None = None) -> dict | None:
    """Refuse a config that does not fit the embeddings of a store.

    Runs whenever the Snakefile is parsed, so it must be cheap: it hashes a checkpoint given by path only if the file's size or
    times differ from the receipt.

    Parameters
    ----------
    store, config
        The store's folder and the checked config.
    weights
        The receipt of `lengthwise.esm2.download.fetch`, once the weights are there.

    Returns
    -------
    The store's settings; None if there is no store yet, or one without an embedding that has other settings.

    Raises
    ------
    LengthwiseError
        The store holds embeddings, and the config differs in a setting of `COMPARABLE` or in the default layer; the error names
        all differences.
    """
    stored = load(store)
    if stored is None:
        return None
    asked = {**stored, "numerics": NUMERICS, "storage_dtype": config["storage_dtype"]}
    num_layers = (weights or stored)["num_layers"]
    layers = order_layers(config, num_layers)
    asked["layers"] = stored["layers"] if set(layers) == set(stored["layers"]) else layers
    asked["outputs"] = [output for output in OUTPUTS if output in config["outputs"]]
    if config["precision"] != "auto":
        asked["precision"] = config["precision"]
    if "contacts" in stored["outputs"]:
        asked["contacts_max_residues"] = config["contacts_max_residues"]
        asked["contact_regression_sha256"] = (weights or stored).get("contact_regression_sha256", "")
    if weights is not None:
        # transformers keeps the number of heads beside the weights: no checksum of theirs tells it.
        asked |= {"weights_sha256": weights["sha256"], "attention_heads": weights["attention_heads"]}
    elif is_path(config["model"]):
        asked["weights_sha256"] = _current_sha256(store, config["model"])
    differences = [
        f"{key} is {_format_value(stored[key])} there and {_format_value(asked[key])} in the config"
        for key in (*comparable(stored), "attention_heads")
        if stored[key] != asked[key]
    ]
    default = _default_layer(config, num_layers)
    if asked["layers"] == stored["layers"] and default not in (None, stored["layers"][0]):
        differences.append(
            f"default_layer is {stored['layers'][0]} there and {default} in the config (ds.layer({default}) reads it)"
        )
    if differences:
        if not has_embedding(store):
            return None
        raise LengthwiseError(
            f"the config does not fit the embeddings in the store {store}: {'; '.join(differences)}. "
            f"Set the config back, or use another 'results' (or 'model'){_without_embedding(stored, asked)}"
        )
    return stored


def _without_embedding(stored: dict, asked: dict) -> str:
    """Which of the outputs that are asked for need no forward pass, for the end of a refusal."""
    new = [output for output in asked["outputs"] if output in OF_ROWS and output not in stored["outputs"]]
    if not new:
        return ""
    if "residue" in stored["outputs"]:
        return f". Reading computes {' and '.join(new)} from stored rows without that: ds.pooled({new[0]!r})"
    return f". {' and '.join(new)} cannot be had without a forward pass: the store has no rows of residues"


def create_or_check(store: Path, config: dict, weights: dict, auto_device: str) -> dict:
    """Compare the config and the weights with the store's settings; write settings.json if it does not exist or was replaced.

    Parameters
    ----------
    store, config
        The store's folder and the checked config.
    weights, auto_device
        As for `make`.

    Returns
    -------
    The store's settings.

    Raises
    ------
    LengthwiseError
        As for `guard`.
    """
    settings, path = guard(store, config, weights) or make(config, weights, auto_device), Path(store) / "settings.json"
    if not path.exists() or _read(path)[0] != settings:
        write_json(path, settings)
    return settings


def _current_sha256(store: Path, model: str) -> str:
    """The SHA-256 of a checkpoint given by path: the receipt's if the file did not change."""
    receipt = {}
    with suppress(FileNotFoundError, LengthwiseError):  # a damaged one is made again
        receipt = read_json(Path(store) / "weights.json", "sha256")
    if weights_stamp(Path(model)).items() <= receipt.items():
        return receipt["sha256"]
    return identity(file_sha256(Path(model)))


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)[:12] + "..." if len(str(value)) == 64 else str(value)
