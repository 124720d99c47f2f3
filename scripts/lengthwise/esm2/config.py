"""The shapes of the ESM-2 models, with their operations and memory; without torch, whose import takes seconds."""

from dataclasses import dataclass
from math import log
from typing import overload

import numpy as np

# Tokens per batch where `batch_tokens` is auto. On a CPU larger batches cost memory and gain no speed.
AUTO_BATCH_TOKENS = {"cpu": 2_048, "cuda": 32_768}
# Share of a GPU's free memory that a batch may take; the rest is for what the formula leaves out and for other processes.
MEMORY_MARGIN = 0.9
# Most batches that a CPU computes at the same time: each takes memory.
MOST_AT_ONCE = 16
# What a CPU's passes take of resident memory, against what is counted; and after n batches the allocator keeps for each core what
# KEPT * ln(n) of them used, of KEPT_TO batches at most. Measured with 8M, 35M and 150M, one protein of 4,000 to 16,000 residues,
# and 20 to 966 batches of 400 to 16,384 tokens on one and two cores, in float32 and bfloat16 (glibc 2.36, torch 2.13).
RESIDENT_SHARE, KEPT, KEPT_TO = 1.4, 0.45, 400


@dataclass(frozen=True)
class ModelConfig:
    """The shape of an ESM-2 model."""

    num_layers: int
    embed_dim: int
    attention_heads: int
    vocabulary_size: int = 33

    @property
    def parameters(self) -> int:
        """Number of weights of the layers, the token embedding and the final LayerNorm."""
        d = self.embed_dim
        return self.num_layers * (12 * d * d + 13 * d) + (self.vocabulary_size + 2) * d

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.attention_heads

    @overload
    def flops(self, length: int) -> int: ...
    @overload
    def flops(self, length: np.ndarray) -> np.ndarray: ...
    def flops(self, length: int | np.ndarray) -> int | np.ndarray:
        """Floating-point operations of a sequence, from its residues (a number or an array).

        Per token and layer: 24 d^2 in matrix products, 4 d (L + 2) in attention.
        """
        d, tokens = self.embed_dim, length + 2
        return self.num_layers * tokens * (24 * d * d + 4 * d * tokens)

    @overload
    def attention_flops(self, length: int) -> int: ...
    @overload
    def attention_flops(self, length: np.ndarray) -> np.ndarray: ...
    def attention_flops(self, length: int | np.ndarray) -> int | np.ndarray:
        """The operations of attention alone, see `flops`."""
        return self.num_layers * 4 * self.embed_dim * (length + 2) ** 2

    def bytes_per_token(self, itemsize: int, stored_bytes: int = 0) -> int:
        """Memory that a GPU's packed forward pass needs beside the weights, for each token of a batch, whatever the lengths.

        Counted over the tensors alive at once in an uncompiled layer: in the rotary embedding the sums, q, k and v, and six
        copies of the width in float32; in the feed-forward part the sums before and after attention and their LayerNorm in
        float32, attention's result, fc1 and its GELU.

        Parameters
        ----------
        itemsize
            Bytes of a number of the compute type.
        stored_bytes
            Of each residue in the results: those of the batch before are still being copied out.
        """
        rotary = 4 + 3 * itemsize + 24
        feed_forward = 12 + (9 if itemsize == 4 else 10) * itemsize
        return self.embed_dim * max(rotary, feed_forward) + 4 * self.head_dim + stored_bytes

    def resident_bytes(
        self, itemsize: int, batch_tokens: int, cores: int, stored_bytes: int = 0, batches: float = 64
    ) -> int:
        """Resident memory that a CPU's forward passes of many batches come to take beside the process and its weights.

        Parameters
        ----------
        itemsize, stored_bytes
            As of `bytes_per_token`.
        batch_tokens
            Of a batch: on a core of its own, or, where it is longer than usual, on all of them.
        cores
            That compute.
        batches
            How many; the memory grows with their logarithm, for a while.
        """
        cores, usual = min(cores, MOST_AT_ONCE), min(batch_tokens, AUTO_BATCH_TOKENS["cpu"])
        # What goes into qkv, out_proj, fc1 and fc2 and comes out; in float32 oneDNN adds the residual too.
        products = (18 if itemsize == 4 else 16) * itemsize * self.embed_dim
        computed = self.resident_bytes_alone(itemsize, max(batch_tokens, cores * usual), stored_bytes)
        kept = KEPT * log(min(max(batches, 1), KEPT_TO))
        return computed + int(kept * cores * min(batch_tokens, 2 * AUTO_BATCH_TOKENS["cpu"]) * products)

    def resident_bytes_alone(self, itemsize: int, tokens: int, stored_bytes: int = 0) -> int:
        """The same of a first batch of so many tokens, while nothing is kept of others yet."""
        return int(RESIDENT_SHARE * self.bytes_per_token(itemsize, stored_bytes) * tokens)


# Source: the checkpoints' names and https://github.com/facebookresearch/esm#available-models
MODELS = {
    "esm2_t6_8M_UR50D": ModelConfig(6, 320, 20),
    "esm2_t12_35M_UR50D": ModelConfig(12, 480, 20),
    "esm2_t30_150M_UR50D": ModelConfig(30, 640, 20),
    "esm2_t33_650M_UR50D": ModelConfig(33, 1280, 20),
    "esm2_t36_3B_UR50D": ModelConfig(36, 2560, 40),
    "esm2_t48_15B_UR50D": ModelConfig(48, 5120, 40),
}
