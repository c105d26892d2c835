"""From packed data sets to training batches: readers, their order, caches, staging."""
