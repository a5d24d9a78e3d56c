"""Data card: a Markdown description of a data set, with tables, plots and sample images."""
