"""MLflow tracking: the store, the runs in it, and their provenance."""
