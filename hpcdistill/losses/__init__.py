"""Loss terms, each a mean over its elements; the weights belong to the methods."""
