"""Training: all that a training runs, and no more."""
