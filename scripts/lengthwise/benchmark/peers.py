"""The other engines in torch: fair-esm and transformers, with the same weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lengthwise.errors import LengthwiseError
from lengthwise.esm2 import checkpoint
from lengthwise.esm2.batching import cut_batches
from lengthwise.esm2.devices import DTYPES
from lengthwise.esm2.shapes import AUTO_BATCH_TOKENS, ModelConfig
from lengthwise.esm2.tokens import PAD, tokenize

EXTRACT_TOKENS = 4_096  # extract.py's --toks_per_batch


class Part(NamedTuple):
    """What an engine has embedded so far since its last part."""

    rows: list[
        np.ndarray
    ]  # one after the other: the last layer of each sequence, or their means where only these are computed
    peak_bytes: int | None = None  # of the GPU's allocator, where the engine measured it


# Embeds sequences that are sorted by length, shortest first. The call prepares; the device works while the parts are taken.
Embed = Callable[[list[bytes]], Iterator[Part]]


@torch.inference_mode()
def reference(weights: Path, sequences: list[bytes], device: torch.device) -> list[np.ndarray]:
    """The last layer of fair-esm's own model in float32, one sequence at a time: [L, D] of each."""
    model = checkpoint.reference_model(weights, device)
    rows = []
    for sequence in sequences:
        tokens = torch.from_numpy(tokenize(sequence)).long()[None].to(device)  # [1, L + 2]
        result = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]  # [1, L + 2, D]
        rows.append(result[0, 1:-1].cpu().numpy())
    return rows


def load_extract_loop(weights: Path, device: torch.device) -> Embed:
    """The loop of fair-esm's scripts/extract.py with its default options, without writing files."""
    from esm.data import FastaBatchedDataset

    model = checkpoint.reference_model(weights, device)
    alphabet: Any = model.alphabet
    convert, layer = alphabet.get_batch_converter(), model.num_layers

    @torch.no_grad()
    def embed(sequences: list[bytes]) -> Iterator[Part]:
        dataset = FastaBatchedDataset([str(i) for i in range(len(sequences))], [s.decode() for s in sequences])
        batches = dataset.get_batch_indices(EXTRACT_TOKENS, extra_toks_per_seq=1)
        loader = torch.utils.data.DataLoader(dataset, collate_fn=convert, batch_sampler=batches)
        for _, strings, tokens in loader:
            result = model(tokens.to(device, non_blocking=True), repr_layers=[layer], return_contacts=False)
            hidden = result["representations"][layer].to("cpu")  # [N, L + 2, D]
            yield Part([hidden[i, 1 : len(string) + 1].clone().numpy() for i, string in enumerate(strings)])

    return embed


def load_transformers(weights: Path, config: ModelConfig, device: torch.device, precision: str) -> Embed:
    """Hugging Face's EsmModel with padded batches of this engine's number of tokens."""
    from transformers import EsmModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])  # on a GPU, 15B in float32 would fill it
    try:
        with device:
            model = EsmModel(_hugging_face_config(config), add_pooling_layer=False)
    finally:
        torch.set_default_dtype(default)
    missing = model.load_state_dict(hugging_face_tensors(weights), strict=False).missing_keys
    if wanted := [name for name in missing if not name.startswith(("embeddings.position", "contact_head"))]:
        raise LengthwiseError(
            f"benchmark: the installed transformers has another name for the weights {wanted[0]}; install another version"
        )
    model = model.eval().to(device, DTYPES[precision])

    @torch.inference_mode()
    def embed(sequences: list[bytes]) -> Iterator[Part]:
        for start, stop in cut_batches(np.array([len(s) for s in sequences]), AUTO_BATCH_TOKENS[device.type]):
            batch = [torch.from_numpy(tokenize(sequence)).long() for sequence in sequences[start:stop]]
            tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD).to(device)
            hidden = model(tokens, attention_mask=(tokens != PAD).long()).last_hidden_state  # [N, L + 2, D]
            hidden = hidden.half().cpu() if precision != "float32" else hidden.cpu()
            yield Part([hidden[i, 1 : len(sequences[start + i]) + 1].numpy() for i in range(stop - start)])

    return embed


def hugging_face_tensors(weights: Path) -> dict[str, torch.Tensor]:
    """The encoder of a fair-esm checkpoint under Hugging Face's names."""
    parts = {
        "self_attn_layer_norm": "attention.LayerNorm",
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn.rot_emb": "attention.self.rotary_embeddings",
        "final_layer_norm": "LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in checkpoint.read(weights)[1].items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            renamed[f"encoder.layer.{number}.{parts[part]}.{kind}"] = tensor
        elif name.startswith("emb_layer_norm_after"):
            renamed[f"encoder.{name}"] = tensor
        elif name == "embed_tokens.weight":
            renamed["embeddings.word_embeddings.weight"] = tensor
    return renamed


def _hugging_face_config(config: ModelConfig) -> Any:
    from transformers import EsmConfig

    return EsmConfig(
        vocab_size=config.vocabulary_size,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.attention_heads,
        intermediate_size=4 * config.embed_dim,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        pad_token_id=PAD,
        mask_token_id=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
