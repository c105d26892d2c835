"""Where jobs that were submitted by earlier code look for theirs; everything else is in `hpcdistill.sweep`."""
