"""Checkpoints as transformers' save_pretrained writes them: config.json, and safetensors in one file or several.

Any model with an ESM-2 encoder in it will do: EsmModel, EsmForMaskedLM, fine-tuned ones with heads of their own.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.devices import cannot_map, is_out_of_memory
from lengthwise.esm2.model import LAYER_NORM_EPS
from lengthwise.esm2.rotary import ROTARY_BASE, computed_inv_freq
from lengthwise.esm2.shapes import ModelConfig
from lengthwise.esm2.sources import VOCABULARY as VOCABULARY_FILE
from lengthwise.esm2.sources import (
    config_path,
    not_served,
    other_family,
    require_all_layers,
    require_feed_forward,
    weight_files,
)
from lengthwise.esm2.tokens import PAD, VOCABULARY

# Of config.json: {key: (ESM-2's value, what a file without the key means)}.
_SETTINGS: dict[str, tuple[Any, Any]] = {
    "position_embedding_type": ("rotary", "absolute"),
    "token_dropout": (True, False),
    "emb_layer_norm_before": (False, False),
    "layer_norm_eps": (LAYER_NORM_EPS, 1e-12),
    "rope_theta": (ROTARY_BASE, ROTARY_BASE),
    "is_decoder": (False, False),
    "add_cross_attention": (False, False),
    "pad_token_id": (PAD, PAD),
    "mask_token_id": (VOCABULARY.index("<mask>"), VOCABULARY.index("<mask>")),
}
# {fair-esm's name: transformers'}
_OF_A_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}
_OF_THE_ENCODER = {
    "embed_tokens.weight": "embeddings.word_embeddings.weight",
    "emb_layer_norm_after.weight": "encoder.emb_layer_norm_after.weight",
    "emb_layer_norm_after.bias": "encoder.emb_layer_norm_after.bias",
    "contact_head.regression.weight": "contact_head.regression.weight",
    "contact_head.regression.bias": "contact_head.regression.bias",
}
_OF_THE_HEAD = {
    "lm_head.weight": "lm_head.decoder.weight",
    **{f"lm_head.{part}": f"lm_head.{part}" for part in ("bias", "dense.weight", "dense.bias")},
    **{f"lm_head.layer_norm.{kind}": f"lm_head.layer_norm.{kind}" for kind in ("weight", "bias")},
}
# transformers writes LayerNorms under torch's names, from some version of 5 on under TensorFlow's.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_OF_THE_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def read(path: Path) -> tuple[ModelConfig, dict[str, Tensor], bool, dict[str, str]]:
    """Open a checkpoint, memory-mapped.

    Parameters
    ----------
    path
        A folder, or a safetensors file with config.json beside it.

    Returns
    -------
    (shape, state, has_frequencies, names)
        `state` has the tensors that ESM-2 has, as far as they are there, under fair-esm's names and cut to its 33 tokens;
        `has_frequencies` says whether its rotary frequencies are the files', or else computed;
        `names` has the files' own names by fair-esm's.

    Raises
    ------
    LengthwiseError
        The files cannot be read, or hold no ESM-2.
    """
    config = read_config(config_path(path))
    tensors = _open(path)
    prefix = _prefix(path, tensors)
    require_all_layers(config_path(path), tensors, f"{prefix}encoder.layer.", config.num_layers, "num_hidden_layers")
    state: dict[str, Tensor] = {}
    theirs = names(config, prefix)
    for name, there in theirs.items():
        for written in (there, _old_name(there)):
            if written in tensors:
                state[name] = tensors[written]
    for name in _OF_THE_VOCABULARY:  # it may be padded, or have further tokens, which no protein has
        if name in state:
            state[name] = state[name][: config.vocabulary_size]
    if "lm_head.dense.weight" in state and "embed_tokens.weight" in state:  # safetensors holds what is shared once
        state.setdefault("lm_head.weight", state["embed_tokens.weight"])
    frequencies = _frequencies(config, prefix, tensors)
    for index, found in (frequencies or dict.fromkeys(range(config.num_layers), computed_inv_freq(config))).items():
        state[f"layers.{index}.self_attn.rot_emb.inv_freq"] = found
    return config, state, bool(frequencies), theirs


def names(config: ModelConfig, prefix: str) -> dict[str, str]:
    """{fair-esm's name of a tensor: transformers'}, rotary frequencies left out; `prefix` is that of the encoder."""
    found = {name: f"{prefix}{there}" for name, there in _OF_THE_ENCODER.items()} | _OF_THE_HEAD
    for index in range(config.num_layers):
        for name, there in _OF_A_LAYER.items():
            for kind in ("weight", "bias"):
                found[f"layers.{index}.{name}.{kind}"] = f"{prefix}encoder.layer.{index}.{there}.{kind}"
    return found


def read_config(path: Path) -> ModelConfig:
    """The shape of a model, by its config.json, and that of its vocab.txt if there is one.

    Raises
    ------
    LengthwiseError
        The file is missing or damaged, or the model is not of ESM-2's architecture and vocabulary.
    """
    config = _read_json(path)
    kind = config.get("model_type")
    if kind != "esm":
        family = other_family(str(kind)) or other_family(path.absolute().parent.name)
        what = (
            not_served(family or f"a model of type {kind!r}")
            if kind
            else "names no model_type, so no transformers model"
        )
        raise LengthwiseError(f"{path}: {what}")
    found = {key: config.get(key) if config.get(key) is not None else ours[1] for key, ours in _SETTINGS.items()}
    if found["position_embedding_type"] == "absolute":
        raise LengthwiseError(
            f"{path}: {not_served('ESM-1b' if found['emb_layer_norm_before'] else 'ESM-1v or another ESM-1')}"
        )
    for key, (expected, _) in _SETTINGS.items():
        if found[key] != expected:
            raise LengthwiseError(f"{path}: {key} is {found[key]!r}; ESM-2 has {expected!r}, and no other is served")
    width, heads = _size(path, config, "hidden_size"), _size(path, config, "num_attention_heads")
    if width % (2 * heads):
        raise LengthwiseError(f"{path}: a hidden_size of {width} does not fit {heads} rotary heads")
    if config.get("intermediate_size") is not None:
        require_feed_forward(path, _size(path, config, "intermediate_size"), width)
    _require_vocabulary(path, config)
    return ModelConfig(_size(path, config, "num_hidden_layers"), width, heads)


def _size(path: Path, config: dict, key: str) -> int:
    number = config.get(key)
    if type(number) is not int or number <= 0:
        raise LengthwiseError(f"{path}: {key} is {number!r}, which is no size")
    return number


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LengthwiseError(
            f"{path}: is missing; transformers' save_pretrained writes it beside the weights, and it has their sizes"
        ) from error
    except (OSError, ValueError) as error:
        raise LengthwiseError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise LengthwiseError(f"{path}: is not the config of a transformers model")
    return content


def _require_vocabulary(path: Path, config: dict) -> None:
    """Refuse another order of the 33 tokens than ESM-2's; whatever follows them is never looked up."""
    listed: dict[str, list] = {f"{path}: vocab_list": config.get("vocab_list") or []}
    file = path.with_name(VOCABULARY_FILE)
    if file.exists():
        listed[str(file)] = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    for where, tokens in listed.items():
        for number, expected in enumerate(VOCABULARY if tokens else ()):
            token = str(tokens[number])[:40] if number < len(tokens) else ""
            if token != expected:
                raise LengthwiseError(f"{where}: token {number} is {token!r}; it is {expected!r} in ESM-2's vocabulary")
    size = _size(path, config, "vocab_size")
    if size < len(VOCABULARY):
        raise LengthwiseError(f"{path}: vocab_size is {size}; ESM-2's vocabulary has {len(VOCABULARY)} tokens")


def _open(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                stored = opened.keys()
                tensors |= {name: opened.get_tensor(name) for name in stored}
        except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise cannot_map(file) from error
            reason = str(error).removeprefix("Error while deserializing header: ").splitlines()[0]
            raise LengthwiseError(f"{file}: damaged, or no safetensors file ({reason})") from error
    return tensors


def _prefix(path: Path, tensors: dict[str, Tensor]) -> str:
    """What stands before the names of the encoder's tensors: nothing in an EsmModel, ``esm.`` in models around one."""
    ending = _OF_THE_ENCODER["embed_tokens.weight"]
    found = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    if len(found) != 1:
        adapters = " (adapters of PEFT: save the model merged, by merge_and_unload)" if _has_adapters(tensors) else ""
        raise LengthwiseError(f"{path}: holds {len(found)} tensors {ending}{adapters}; an ESM-2 encoder has one")
    return found[0]


def _has_adapters(tensors: dict[str, Tensor]) -> bool:
    return any("lora_" in name for name in tensors)


def _frequencies(config: ModelConfig, prefix: str, tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """{layer: its rotary frequencies}, all of them, or those that are there; empty if the files hold none.

    transformers writes them for each layer, from some version of 5 on once, under a name with an asterisk.
    """
    ending = "rotary_embeddings.inv_freq"
    for shared in (f"{prefix}{ending}", f"{prefix}encoder.layer.*.attention.self.{ending}"):
        if shared in tensors:
            return dict.fromkeys(range(config.num_layers), tensors[shared])
    of_layers = {index: f"{prefix}encoder.layer.{index}.attention.self.{ending}" for index in range(config.num_layers)}
    return {index: tensors[name] for index, name in of_layers.items() if name in tensors}


def _old_name(name: str) -> str:
    for new, old in _OLD_NAMES.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name
