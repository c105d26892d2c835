"""Packed data sets: writing, verifying and reading them in a reproducible order."""
