"""hpcdistill: small image generators distilled from large ones, on one GPU, many GPUs or a cluster."""

import os

# Before torch is imported. A rank whose peers are gone would print C++ frames; `ranks.watchdog` says it better.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.1.0"
