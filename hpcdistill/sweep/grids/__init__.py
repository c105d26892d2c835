"""Grids of configurations, and the plan of what is to be run."""
