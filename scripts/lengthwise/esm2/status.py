"""The status of a sequence after the forward pass, as stored in a shard's `status` tensor."""

from enum import IntEnum


class Status(IntEnum):
    """Rows of a sequence whose status is not GOOD are NaN."""

    GOOD = 0
    NON_FINITE = 1  # a number is beyond the range of the compute or storage type
    DOES_NOT_FIT = 2  # even alone, the sequence is too long for the device's memory
