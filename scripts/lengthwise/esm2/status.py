"""What became of a sequence in the forward pass, as a shard's `status` tensor says it."""

from enum import IntEnum


class Status(IntEnum):
    """Good; or numbers beyond the range of a type; or a sequence too long for the device's memory. Bad rows are NaN."""

    GOOD = 0
    NON_FINITE = 1
    DOES_NOT_FIT = 2
