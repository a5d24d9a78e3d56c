"""Sources of labelled images: folders, archives, tables, Parquet files and torchvision data sets."""
