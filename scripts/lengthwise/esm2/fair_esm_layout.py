"""Checkpoints in fair-esm's layout, a ``.pt``: read without running their code."""

import argparse
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.devices import cannot_map, is_out_of_memory
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.sources import not_served, require_all_layers

RANDOM_SEED_KEY = "lengthwise_random_seed"  # marks the cfg of a checkpoint written by `checkpoint.write_random`
_READ_ERRORS = (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, struct.error)
_PREFIXES = ("encoder.sentence_encoder.", "encoder.")
# fair-esm's own names of the architectures before ESM-2 (esm/pretrained.py).
_OTHERS = {"roberta_large": "ESM-1b or ESM-1v", "protein_bert_base": "ESM-1", "msa_transformer": "the MSA Transformer"}


def read(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], bool]:
    """Open a checkpoint, memory-mapped. Code in the pickle is refused and never runs.

    Returns
    -------
    (shape, state, random)
        `state` has fair-esm's names without their ``encoder.`` prefixes; `random` says whether `write_random` wrote it.

    Raises
    ------
    LengthwiseError
        The file cannot be read, or is not an ESM-2 checkpoint.
    """
    data = _load(path)
    if family := _other_family(data):
        raise LengthwiseError(f"{path}: {not_served(family)}")
    try:
        if not isinstance(data, dict):
            raise TypeError("not a dict")
        model = data["cfg"]["model"]
        config = ModelConfig(model.encoder_layers, model.encoder_embed_dim, model.encoder_attention_heads)
        if not all(type(number) is int and number > 0 for number in vars(config).values()):
            raise TypeError("not the shape of a model")
        state = {_strip(name): tensor for name, tensor in data["model"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise LengthwiseError(
            f"{path}: a torch file, but no ESM-2 checkpoint in fair-esm's layout (it should hold cfg.model and model); "
            "a model of transformers is read from the folder that its save_pretrained writes"
        ) from error
    require_all_layers(path, state, "layers.", config.num_layers, "encoder_layers")
    return config, state, hasattr(model, RANDOM_SEED_KEY)


def contact_regression_path(path: Path) -> Path:
    """Where fair-esm keeps the contact head's weights of a checkpoint."""
    return path.with_name(f"{path.stem}-contact-regression.pt")


def read_contact_regression(path: Path) -> dict[str, torch.Tensor]:
    """The contact head's weights of a checkpoint, from the file that fair-esm keeps beside it; empty without one.

    Raises
    ------
    LengthwiseError
        The file cannot be read.
    """
    path = contact_regression_path(path)
    if not path.exists():
        return {}
    data = _load(path)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise LengthwiseError(f"{path}: no weights of a contact head in fair-esm's layout")
    return {_strip(name): tensor for name, tensor in data["model"].items()}


def _load(path: Path) -> Any:
    try:
        # fair-esm's own local loader fails on torch 2.6 and later, and its loader for downloads runs pickled code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*_READ_ERRORS, pickle.UnpicklingError, MemoryError) as error:
        if is_out_of_memory(error):
            raise cannot_map(path) from error
        raise LengthwiseError(f"{path}: {_explain(path, error)}") from error


def _other_family(data: Any) -> str:
    arguments = data.get("args") if isinstance(data, dict) else None
    return _OTHERS.get(getattr(arguments, "arch", ""), "")


def _strip(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _explain(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch does not load. Torch's own message advises to run the code in it."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    if not zipfile.is_zipfile(path):
        return "damaged, or no torch checkpoint: it is not the archive that torch.save writes"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (*_READ_ERRORS, pickle.UnpicklingError):
        classes = []
    if classes:
        return (
            f"refused, because it holds {classes[0][:200]}, whose code would run; fair-esm's checkpoints hold no code"
        )
    return "damaged, or no torch checkpoint: torch cannot read its content"
