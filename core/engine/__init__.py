"""The loop and what it stands on: optimizers, checkpoints, figures, memory, processes."""
