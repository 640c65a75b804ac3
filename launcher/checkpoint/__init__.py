"""What survives: weights, checkpoints, the run folder, and where a resumed run begins."""
