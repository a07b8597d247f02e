"""Training: optimizers, the local step, the loop and its checkpoints."""
