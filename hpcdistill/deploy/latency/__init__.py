"""How long finished networks take, and how much memory: `benchmark latency`."""
