"""Search: better settings than the first ones, outside of what a training run depends on."""
