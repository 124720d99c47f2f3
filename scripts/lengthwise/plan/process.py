"""What a process takes beside its batches. Without numpy: the workflow reads it while it parses."""

# Python and torch before any work: measured 0.4 GB on the CPU; assumed for CUDA with its libraries and torch.compile.
PROCESS_BYTES = {"cpu": 1.0e9, "cuda": 8.0e9}
# Starting Python and torch on a node, and compiling.
START_SECONDS = 300.0
# The parity receipt takes at most this share of its job's time, or these seconds if that is more.
PARITY_SHARE, PARITY_SECONDS = 0.02, 10.0
