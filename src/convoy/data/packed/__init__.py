"""The prepared data set, as training and evaluation read it."""
