"""What became of a sequence in the forward pass, as a shard's `status` tensor says it."""

GOOD, NON_FINITE, DOES_NOT_FIT = 0, 1, 2

# Of a record whose sequence is not good: its reason in the ledger; {gigabytes} is what its length needs.
REASONS = {
    NON_FINITE: "non_finite: the compute or storage type overflowed; float32 for both is the way out",
    DOES_NOT_FIT: (
        "does_not_fit: needs about {gigabytes} GB of memory beside the weights; retry_rejected: true in the config takes it"
        " up on a device that has more"
    ),
}
