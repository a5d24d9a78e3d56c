"""Tracking: the store of MLflow, the runs in it, and where they come from."""
