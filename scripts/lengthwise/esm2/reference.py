"""The reference: fair-esm's own ESM2 in any type, its weights loaded layer by layer, so that one layer is in memory at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lengthwise.esm2 import checkpoint


class _StreamedLayer(nn.Module):
    """A layer of fair-esm whose weights exist only while it computes."""

    def __init__(self, layer: nn.Module, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.layer, self.state, self.device, self.dtype = layer, state, device, dtype

    def forward(self, *given: Tensor, **options: Any) -> Any:
        weights = {name: tensor.to(self.device, self.dtype) for name, tensor in self.state.items()}
        self.layer.load_state_dict(weights, assign=True)
        result = self.layer(*given, **options)
        self.layer.to("meta")
        return result


@torch.no_grad()  # not inference_mode: fair-esm caches its rotary tables
def reference_rows(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    sequences: Sequence[bytes],
    layers: Sequence[int],
    logits: bool = False,
) -> dict[int | None, list[np.ndarray]]:
    """Hidden representations by fair-esm, of one padded batch.

    Parameters
    ----------
    path
        A checkpoint, as of `lengthwise.esm2.checkpoint.read`.
    device, dtype
        Where and in which type fair-esm computes.
    sequences
        Normalised residues of each of the N sequences.
    layers
        Indices from 0 to num_layers.
    logits
        Whether to compute logits too.

    Returns
    -------
    {layer: N arrays [L + 2, D] in float64}, the rows of BOS and EOS included; logits [L + 2, 33] under None.

    Raises
    ------
    RuntimeError
        torch does not compute that type on that device, or memory runs out.
    """
    from esm.model import esm2

    config, state, *_ = checkpoint.read(path)
    with torch.device("meta"):
        model = esm2.ESM2(config.num_layers, config.embed_dim, config.attention_heads)
    outer = {name: tensor.to(device, dtype) for name, tensor in state.items() if not name.startswith("layers.")}
    model.load_state_dict(outer, strict=False, assign=True)  # the contact head has no weights here
    if not logits:
        model.lm_head = nn.Identity()
    model.layers = nn.ModuleList(
        _StreamedLayer(layer, _with_prefix(state, f"layers.{index}."), device, dtype)
        for index, layer in enumerate(model.layers)
    )
    convert = model.alphabet.get_batch_converter()
    _, _, tokens = convert([("", sequence.decode()) for sequence in sequences])  # [N, L + 2]
    found = model.eval()(tokens.to(device), repr_layers=list(layers))
    hidden = found["representations"] | ({None: found["logits"]} if logits else {})
    return {
        layer: [rows[i, : len(sequence) + 2].double().cpu().numpy() for i, sequence in enumerate(sequences)]
        for layer, rows in hidden.items()
    }


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
