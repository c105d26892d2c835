"""The support modules beside this file (packed_sets, serving, ...) are imported by name from the folders below."""
