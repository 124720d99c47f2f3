"""The status of a sequence after the forward pass, as stored in a shard's `status` tensor."""

from collections.abc import Collection
from enum import IntEnum


class Status(IntEnum):
    """Rows of a sequence whose status is not GOOD are NaN."""

    GOOD = 0
    NON_FINITE = 1  # a number is beyond the range of the compute or storage type
    DOES_NOT_FIT = 2  # even alone, the sequence is too long for the device's memory


def overflow_reason(precision: str, storage_dtype: str, storage_key: str, outputs: Collection[str]) -> str:
    """Why a sequence is NON_FINITE, and what to do, in words; `storage_key` is what the user sets the storage type by."""
    types = {"precision": precision}
    if "residue" in outputs or "logits" in outputs:  # all others are float32
        types[storage_key] = storage_dtype
    smaller = [key for key, dtype in types.items() if dtype != "float32"]
    advice = f"set {' and '.join(smaller)} to float32; if that does not help, " if smaller else ""
    return (
        f"non_finite: a number overflowed {' or '.join(dict.fromkeys(types.values()))}; {advice}"
        "the model's weights make numbers beyond float32"
    )
