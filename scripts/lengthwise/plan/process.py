"""What a process takes before any work. Without numpy: the workflow reads it while it parses."""

# Python and torch before any work: measured 0.4 GB on the CPU; assumed for CUDA with its libraries and torch.compile.
PROCESS_BYTES = {"cpu": 1.0e9, "cuda": 8.0e9}
# Starting Python and torch on a node, and compiling.
START_SECONDS = 300.0
