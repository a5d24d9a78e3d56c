"""The code that runs during training."""
