"""Getting bytes: downloads, streams and archives, verified."""
