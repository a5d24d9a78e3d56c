"""Registry: versions of the registered model, and loading them."""
