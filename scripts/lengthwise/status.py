"""What became of a sequence in the forward pass, as a shard's `status` tensor says it."""

GOOD, NON_FINITE, DOES_NOT_FIT = 0, 1, 2

# Of a record whose sequence is not good: its reason in the ledger.
REASONS = {
    NON_FINITE: "non_finite: the compute or storage type overflowed; float32 for both is the way out",
    DOES_NOT_FIT: "does_not_fit: the device's memory does not hold this sequence even alone",
}
