"""Many runs: grids of configurations, their plan, submission to SLURM or here, status, tables and reports."""
