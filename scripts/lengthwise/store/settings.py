"""A store's settings: what makes two embeddings comparable, resolved once and then guarded."""

import hashlib
import json
from pathlib import Path

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.config import MODELS, ModelConfig
from lengthwise.system.files import read_json, sha256, stamp, write_json


def shape_of(settings: dict) -> ModelConfig:
    """The shape of a store's model."""
    return ModelConfig(settings["num_layers"], settings["embed_dim"], settings["attention_heads"])


SCHEMA = 1

# Raised when the engine's numbers change by more than rounding: stores of different numerics do not mix.
NUMERICS = 1

COMPARABLE = ("weights_sha256", "layers", "precision", "storage_dtype", "outputs", "numerics")

OUTPUTS = ("residue", "mean", "bos")

_KINDS = {
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


def resolve_layers(layers: list[int], num_layers: int) -> list[int]:
    """Absolute layer indices, each once, in the order given.

    Raises
    ------
    LengthwiseError
        A layer that the model does not have.
    """
    for layer in layers:
        if not -num_layers - 1 <= layer <= num_layers:
            raise LengthwiseError(
                f"config: layers: {layer} does not exist; the model has layers 0 to {num_layers}, or {-num_layers - 1} to -1"
            )
    return list(dict.fromkeys(int(layer) % (num_layers + 1) for layer in layers))


def make(config: dict, weights: dict, auto_device: str) -> dict:
    """The settings of a new store.

    Parameters
    ----------
    config
        The checked config.
    weights
        The receipt of `lengthwise.esm2.download.fetch`.
    auto_device
        What `device: auto` means, see `lengthwise.system.gpus.auto_device`.
    """
    device = config["device"] if config["device"] != "auto" else auto_device
    precision = config["precision"]
    if precision == "auto":
        precision = "float16" if device == "cuda" else "float32"
    settings = {
        "schema": SCHEMA,
        "model": config["model"],
        "weights_sha256": weights["sha256"],
        "layers": resolve_layers(config["layers"], weights["num_layers"]),
        "precision": precision,
        "storage_dtype": config["storage_dtype"],
        "outputs": [output for output in OUTPUTS if output in config["outputs"]],
        "numerics": NUMERICS,
        "device": device,
        "num_layers": weights["num_layers"],
        "embed_dim": weights["embed_dim"],
        "attention_heads": weights["attention_heads"],
        "random_weights": weights["random_weights"],
    }
    return {**settings, "fingerprint": fingerprint(settings)}


def fingerprint(settings: dict) -> str:
    """SHA-256, in hex, of what makes two embeddings comparable."""
    comparable = {key: settings[key] for key in COMPARABLE} | {"layers": sorted(settings["layers"])}
    return hashlib.sha256(json.dumps(comparable, sort_keys=True).encode()).hexdigest()


def fault(settings: dict) -> str:
    """What is wrong with settings that a file has, in a few words; nothing if they are whole."""
    try:
        if settings["fingerprint"] != fingerprint(settings):
            return "edited by hand"
        wrong = [key for key, kind in _KINDS.items() if type(settings[key]) is not kind]
    except (KeyError, TypeError) as error:
        return f"damaged ({error})"
    if not wrong and not (
        settings["embed_dim"] > 0 and set(settings["layers"]) <= {*range(settings["num_layers"] + 1)}
    ):
        wrong = ["layers"]
    return f"damaged ({wrong[0]} is {str(settings[wrong[0]])[:40]!r})" if wrong else ""


def load(store: Path) -> dict | None:
    """A store's settings, or None where there is no store yet; every manifest has a copy, should settings.json be gone.

    Raises
    ------
    LengthwiseError
        The file is damaged or of a newer version, or gone with all its copies.
    """
    path, store = Path(store) / "settings.json", Path(store)
    if not path.exists():
        path = next(iter(sorted(store.glob("datasets/*/manifest.json"))), None)
        if path is None:
            if any(store.glob("jobs/*.json")):
                raise LengthwiseError(f"{store}/settings.json is gone; put it back, or use another 'results'")
            return None
    settings = read_json(path)
    settings = settings if path.name == "settings.json" else settings.get("settings")
    if isinstance(settings, dict) and type(settings.get("schema")) is int and settings["schema"] > SCHEMA:
        raise LengthwiseError(f"{path}: written by a newer Lengthwise (schema {settings['schema']}); update this one")
    if what := fault(settings):
        raise LengthwiseError(f"{path}: {what}; restore it, or use another 'results'")
    return settings


def require(store: Path) -> dict:
    """A store's settings, which must be there by now."""
    settings = load(store)
    if settings is None:
        raise LengthwiseError(f"{store}/settings.json is gone; run snakemake --forcerun fetch_model")
    return settings


def expected(store: Path, config: dict, auto_device: str) -> dict:
    """A store's settings, or what they will be: of a named model without its weights."""
    if stored := load(store):
        return stored
    shape = MODELS[config["model"]]
    known = {key: getattr(shape, key) for key in ("num_layers", "embed_dim", "attention_heads")}
    return make(config, known | {"sha256": "", "random_weights": False}, auto_device)


def device_of(store: Path, asked: str) -> str:
    """The config's `device`; auto means what the store was made for."""
    return require(store)["device"] if asked == "auto" else asked


def guard(store: Path, config: dict, weights: dict | None = None) -> dict | None:
    """Refuse a config that does not fit an existing store; the store's settings, or None where there is no store yet.

    Cheap enough to run whenever the Snakefile is parsed: a checkpoint given by path is hashed again only when its size or
    time changed since it was recorded.

    Raises
    ------
    LengthwiseError
        With the difference and the ways out.
    """
    stored = load(store)
    if stored is None:
        return None
    asked = {**stored, "numerics": NUMERICS, "storage_dtype": config["storage_dtype"]}
    asked["layers"] = resolve_layers(config["layers"], stored["num_layers"])
    asked["outputs"] = [output for output in OUTPUTS if output in config["outputs"]]
    if config["precision"] != "auto":
        asked["precision"] = config["precision"]
    if weights is not None:
        asked["weights_sha256"] = weights["sha256"]
    elif config["model"].endswith(".pt"):
        asked["weights_sha256"] = _current_sha256(store, config["model"])
    differences = [
        f"{key} is {_shown(stored[key])} there and {_shown(asked[key])} in the config"
        for key in COMPARABLE
        if stored[key] != asked[key]  # of layers the order too: the first is the one that reading gives
    ]
    if differences:
        raise LengthwiseError(
            f"the store {store} holds embeddings that these settings would not match: {'; '.join(differences)}. "
            "Set the config back, or give another 'results' (or 'model')"
        )
    return stored


def create_or_check(store: Path, config: dict, weights: dict, auto_device: str) -> dict:
    """The store's settings, written if they are not there, and compared with the config and the weights if they are."""
    stored = guard(store, config, weights)
    stored = stored or make(config, weights, auto_device)
    if not (Path(store) / "settings.json").exists():
        write_json(Path(store) / "settings.json", stored)
    return stored


def _current_sha256(store: Path, model: str) -> str:
    path = Path(store) / "weights.json"
    receipt = read_json(path, "sha256") if path.exists() else {}
    if stamp(Path(model)).items() <= receipt.items():
        return receipt["sha256"]
    return sha256(Path(model))


def _shown(value) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)[:12] + "..." if len(str(value)) == 64 else str(value)
