"""The microbenchmark suite: what a SAM step costs, against what, and how far from the hardware's limit."""

import os

# Before torch is imported: its profiler and CPU allocator otherwise write notes between the lines of the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
