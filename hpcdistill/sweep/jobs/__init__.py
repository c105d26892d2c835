"""Runs as tasks: on SLURM's arrays, or on this machine."""
