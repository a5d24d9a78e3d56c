"""Monitoring of new images: whether they differ from those that the champion was evaluated on."""
