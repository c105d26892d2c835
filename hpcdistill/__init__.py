"""hpcdistill: small image generators distilled from large ones, on one GPU, many GPUs or a cluster."""

__version__ = "0.1.0"
