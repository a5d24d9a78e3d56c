"""Data sets: labelled images from folders, archives, tables or torchvision, judged and packed."""
