"""Checkpoints of a training run, at the boundaries of optimizer steps, that resume bit for bit."""
