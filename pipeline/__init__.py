"""The stages of the pipeline, one module each; `python -m pipeline` runs them all."""
