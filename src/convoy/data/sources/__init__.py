"""Sources: where labelled images come from, and the labels and splits that they bring."""
