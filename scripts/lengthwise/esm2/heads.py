"""What ESM-2 says of a sequence besides hidden representations: logits, by its language model head.

Shapes: T tokens of a batch, R residues, N sequences, D width; 33 tokens of the vocabulary.
The reference is fair-esm 2.0.0, `esm.modules.RobertaLMHead`.
"""

from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lengthwise.errors import LengthwiseError
from lengthwise.esm2.checkpoint import load_head, read, require_finite_head
from lengthwise.esm2.contacts import ContactHead
from lengthwise.esm2.fair_esm_layout import contact_regression_path
from lengthwise.esm2.model import LAYER_NORM_EPS, Linear, Packing
from lengthwise.esm2.outputs import over_residues
from lengthwise.esm2.tensors import PERPLEXITY


class LMHead(nn.Module):
    """ESM-2's head for masked tokens: a dense layer in the compute type, then LayerNorm and the vocabulary in float32."""

    weight: Tensor  # [33, D] float32
    bias: Tensor  # [33] float32

    def __init__(self, weights: dict[str, Tensor], dtype: torch.dtype):
        """Take the head's weights in float32, under fair-esm's names without ``lm_head.``."""
        super().__init__()
        width = len(weights["dense.bias"])
        with torch.device("meta"):
            self.dense, self.layer_norm = Linear(width, width), nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        state = {name: weights[name].to(dtype) for name in ("dense.weight", "dense.bias")}
        state |= {name: weights[name] for name in ("layer_norm.weight", "layer_norm.bias")}
        self.load_state_dict(state, assign=True)
        self.register_buffer("weight", weights["weight"])  # [33, D]
        self.register_buffer("bias", weights["bias"])  # [33]
        self.dense.pack()
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden representations of the last layer [R, D] to logits [R, 33], in float32."""
        x = self.layer_norm(self.dense.gelu(x).float())  # [R, D]
        return F.linear(x, self.weight, self.bias)  # [R, 33]

    def results(self, hidden: Tensor, tokens: Tensor, packing: Packing, stored: torch.dtype) -> dict[str, Tensor]:
        """The tensors ``logits`` [R, 33] in the storage type, and ``pseudo_perplexity`` [N] in float32.

        The pseudo-perplexity is that of one pass without masks: the exponential of the mean negative log-likelihood of the
        residues that are there, over all 33 tokens. The model sees the residues that it predicts, so this is lower than the
        pseudo-perplexity of one pass per masked residue (Salazar et al. 2020, doi:10.18653/v1/2020.acl-main.240).

        Parameters
        ----------
        hidden
            [T, D] of the last layer in float32.
        tokens
            [T] integers.
        packing
            Where each sequence lies among the T tokens.
        stored
            The storage type.
        """
        logits = self(hidden.index_select(0, packing.residues))  # [R, 33]
        there = tokens.index_select(0, packing.residues).long()  # [R]
        unlikely = F.cross_entropy(logits, there, reduction="none")[:, None]  # [R, 1]
        mean = over_residues(unlikely, packing, ["mean"])["mean"]  # [N, 1]
        return {"logits": logits.to(stored), PERPLEXITY: mean[:, 0].exp()}


def head_facts(path: Path, outputs: Collection[str]) -> dict[str, str]:
    """Check that a checkpoint has the heads that outputs need, and that their values are finite.

    Returns
    -------
    For weights.json: `contact_regression_sha256` where contacts are an output.

    Raises
    ------
    LengthwiseError
        It lacks one, or one has values that are NaN or infinite.
    """
    facts, cpu = {}, torch.device("cpu")
    try:
        if "logits" in outputs:
            load_lm_head(path, cpu, torch.float32)
        if "contacts" in outputs:
            facts["contact_regression_sha256"] = ContactHead.load(path, read(path)[0].num_layers, cpu).sha256
    except LengthwiseError as error:
        head, output, more = "language model", "logits", ""
        if "contact_head" in str(error):
            head, output = "contact", "contacts"
            more = f", or put {contact_regression_path(path).name} beside it" if path.suffix == ".pt" else ""
        raise LengthwiseError(
            f"{error}: this checkpoint has no {head} head that fits; take {output} out of 'outputs'{more}"
        ) from error
    for output, needed in (("logits", "lm_head"), ("contacts", "contact_head")):
        if output in outputs:
            require_finite_head(path, needed)
    return facts


def load_lm_head(path: Path, device: torch.device, dtype: torch.dtype) -> LMHead:
    """Load a checkpoint's language model head.

    Raises
    ------
    LengthwiseError
        The checkpoint does not have it.
    """
    return LMHead(load_head(path, "lm_head", device), dtype)
