"""The shapes of the ESM-2 models, their operations and their memory. Imports neither torch nor numpy: it must load at once."""

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import numpy as np

# Residues of the longest proteins that ESM-2 was trained on (Lin et al. 2023, doi:10.1126/science.ade2574).
TRAINED_RESIDUES = 1022
# Tokens per batch where `batch_tokens` is auto. On a CPU larger batches cost memory and gain no speed.
AUTO_BATCH_TOKENS = {"cpu": 2_048, "cuda": 32_768}
# Share of a GPU's free memory that a batch may take; the rest is for what the formula leaves out and for other processes.
MEMORY_MARGIN = 0.9
# Most batches that a CPU computes at the same time: each takes memory.
MOST_AT_ONCE = 16
# Resident memory of CPU passes, fitted. A pass takes RESIDENT_SHARE times the bytes of a layer's largest tensors. After n batches
# the allocator keeps the memory of KEPT * ln(n) batches per core, with n at most KEPT_TO. Source: jobs of 8M, 35M and 150M, 20
# to 966 batches of 400 to 16,384 tokens or one protein of 4,000 to 16,000 residues, one and two cores, float32 and bfloat16
# (glibc 2.36, torch 2.13).
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
    def flops(self, length: "np.ndarray") -> "np.ndarray": ...
    def flops(self, length: "int | np.ndarray") -> "int | np.ndarray":
        """Floating-point operations of a sequence, from its residues (a number or an array).

        Per token and layer: 24 d^2 in matrix products, 4 d (L + 2) in attention.
        """
        d, tokens = self.embed_dim, length + 2
        return self.num_layers * tokens * (24 * d * d + 4 * d * tokens)

    @overload
    def attention_flops(self, length: int) -> int: ...
    @overload
    def attention_flops(self, length: "np.ndarray") -> "np.ndarray": ...
    def attention_flops(self, length: "int | np.ndarray") -> "int | np.ndarray":
        """The operations of attention alone, see `flops`."""
        return self.num_layers * 4 * self.embed_dim * (length + 2) ** 2

    def bytes_per_token(self, itemsize: int, stored_bytes: int = 0, compiled: bool = False) -> int:
        """GPU memory of a packed forward pass per token of a batch, without the weights; it does not depend on the lengths.

        In an uncompiled layer: the sums before and after attention and their LayerNorm in float32, that LayerNorm in the compute
        type, the result of attention, and fc1. A compiled layer needs most at its end: the sums before and behind it, the
        result of attention, and the next layer's q, k and v, q and k also rotated.

        Parameters
        ----------
        itemsize
            Bytes of a number of the compute type.
        stored_bytes
            Bytes of results per token: the previous batch's results are still being copied out.
        compiled
            Whether torch compiles the layers.
        """
        sums = 8 if compiled else 12
        return self.embed_dim * (sums + 6 * itemsize) + 4 * self.head_dim + stored_bytes

    def resident_bytes(
        self, itemsize: int, batch_tokens: int, cores: int, stored_bytes: int = 0, batches: float = 64
    ) -> int:
        """Resident memory of a CPU's forward passes over many batches, without the process and its weights.

        Parameters
        ----------
        itemsize, stored_bytes
            As of `bytes_per_token`.
        batch_tokens
            Tokens of a batch. A batch of at most `AUTO_BATCH_TOKENS` runs on one core, a longer one on all.
        cores
            Cores that compute.
        batches
            Number of batches of the job.
        """
        cores, usual = min(cores, MOST_AT_ONCE), min(batch_tokens, AUTO_BATCH_TOKENS["cpu"])
        # Inputs and outputs of qkv, out_proj, fc1 and fc2; in float32 oneDNN also adds the residual.
        products = (18 if itemsize == 4 else 16) * itemsize * self.embed_dim
        computed = self.resident_bytes_alone(itemsize, max(batch_tokens, cores * usual), stored_bytes)
        kept = KEPT * log(min(max(batches, 1), KEPT_TO))
        return computed + int(kept * cores * min(batch_tokens, 2 * AUTO_BATCH_TOKENS["cpu"]) * products)

    def reference_bytes(self, itemsize: int, sequences: int, longest: int) -> int:
        """Memory of fair-esm's pass over a padded batch, one layer's weights at a time (`lengthwise.esm2.reference`).

        A layer's weights and the embedding; three matrices of attention scores (before softmax, after it, and its input); 24
        activations of the width.

        Parameters
        ----------
        itemsize
            Bytes of a number of the type.
        sequences, longest
            Number of sequences, and residues of the longest.
        """
        d, tokens = self.embed_dim, longest + 2
        weights = 12 * d * d + self.vocabulary_size * d
        return itemsize * (weights + sequences * tokens * (3 * self.attention_heads * tokens + 24 * d))

    def resident_bytes_alone(self, itemsize: int, tokens: int, stored_bytes: int = 0) -> int:
        """Resident memory of the first batch, before the allocator keeps any."""
        rotary, feed_forward = 28 + 3 * itemsize, 12 + (9 if itemsize == 4 else 10) * itemsize
        tensors = self.embed_dim * max(rotary, feed_forward) + 4 * self.head_dim + stored_bytes
        return int(RESIDENT_SHARE * tensors * tokens)


# Source: the checkpoints' names and https://github.com/facebookresearch/esm#available-models
MODELS = {
    "esm2_t6_8M_UR50D": ModelConfig(6, 320, 20),
    "esm2_t12_35M_UR50D": ModelConfig(12, 480, 20),
    "esm2_t30_150M_UR50D": ModelConfig(30, 640, 20),
    "esm2_t33_650M_UR50D": ModelConfig(33, 1280, 20),
    "esm2_t36_3B_UR50D": ModelConfig(36, 2560, 40),
    "esm2_t48_15B_UR50D": ModelConfig(48, 5120, 40),
}
