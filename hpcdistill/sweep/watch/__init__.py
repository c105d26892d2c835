"""How far a sweep is: its files, and what SLURM says."""
