"""Packed data sets verified, compared and mended."""
