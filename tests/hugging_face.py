"""Seeded checkpoints in transformers' layout, saved by transformers itself, and its own embeddings as a judge."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import EsmConfig, EsmForMaskedLM, EsmModel
from transformers.models.esm.configuration_esm import get_default_vocab_list

from lengthwise.esm2.shapes import ModelConfig

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # it reports which heads a model does without


def config_of(shape: ModelConfig, **others) -> EsmConfig:
    """The config that the published ESM-2 have, in a shape."""
    keys = {
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.attention_heads,
        "intermediate_size": 4 * shape.embed_dim,
    }
    return EsmConfig(**{**keys, **others})


def write(
    folder: Path,
    shape: ModelConfig,
    kind: type = EsmForMaskedLM,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    vocabulary: bool = True,
    sharpness: float = 1,
    **others,
) -> Path:
    """Save a model with seeded weights; `sharpness` is a factor on those of q and k, `others` are keys of its config."""
    generator = torch.Generator().manual_seed(shape.head_dim)
    model = kind(config_of(shape, **others))
    with torch.no_grad():
        for name, weights in sorted(model.named_parameters()):
            gain = sharpness if ".query.weight" in name or ".key.weight" in name else 1
            scale = gain * weights.shape[1] ** -0.5 if weights.dim() == 2 else 0.1
            weights.copy_(scale * torch.randn(weights.shape, generator=generator))
            if "ayer_norm" in name.lower().replace("layernorm", "layer_norm") and name.endswith("weight"):
                weights.add_(1)
            if name.endswith("word_embeddings.weight"):
                weights.mul_(weights.shape[1] ** 0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if vocabulary:
        Path(folder, "vocab.txt").write_text("\n".join(get_default_vocab_list()))
    return Path(folder)


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Save the tensors of a folder's one file again after a change."""
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_transformers_4(tensors: dict[str, torch.Tensor]) -> None:
    """Rename tensors to what transformers 4 wrote: LayerNorms by torch's names, and rotary frequencies for each layer."""
    for name in [*tensors]:
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        tensor = tensors.pop(name)
        if "layer.*" in name:
            layers = {part.split(".layer.")[1].split(".")[0] for part in tensors if ".layer." in part} - {"*"}
            tensors |= {name.replace("*", layer): tensor.clone() for layer in layers}
        else:
            tensors[new] = tensor


def without_frequencies(tensors: dict[str, torch.Tensor]) -> None:
    """Remove the rotary frequencies, which transformers computes then."""
    for name in [name for name in tensors if name.endswith("inv_freq")]:
        del tensors[name]


def inputs(sequence: bytes) -> dict[str, torch.Tensor]:
    """What a model of transformers is called with: a batch of one sequence."""
    tokens = torch.tensor([[0, *(get_default_vocab_list().index(chr(residue)) for residue in sequence), 2]])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@torch.inference_mode()
def rows(folder: Path, sequence: bytes, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """transformers' embeddings [L + 2, D] of a sequence, its weights in float32."""
    model = EsmModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = model(**inputs(sequence), output_hidden_states=True)
    last = model.config.num_hidden_layers
    return {i: (found.last_hidden_state if i == last else found.hidden_states[i])[0].numpy() for i in layers}
