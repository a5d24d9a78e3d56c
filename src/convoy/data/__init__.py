"""Data: from labelled images of any source to packed, checked and split data sets."""
