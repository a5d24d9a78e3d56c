"""Names of the files that stages exchange, in their output folders and in registered models."""

# In every output folder: maps each file name to its sha256 checksum. It is written last.
MANIFEST = "manifest.json"

# fetch and preprocess
IMAGE_TABLE = "images.parquet"

# preprocess
DATASET_INFO = "task.json"
DATA_PROFILE = "data.json"
# The sha256 checksums of the images for training and validation, one a line.
TRAINING_HASHES = "training_images.sha256"
# Pairs of a test image and its near-duplicate among the other images, by checksum.
CROSS_SPLIT_DUPLICATES = "cross_split_duplicates.parquet"

# train
RECORD = "record.json"
WEIGHTS = "weights.safetensors"
HISTORY = "history.csv"

# evaluate
CALIBRATION = "calibration.json"
METRICS = "metrics.json"
PREDICTIONS = "predictions.parquet"
VALIDATION = "validation.parquet"
SLICES = "slices.csv"
PER_CLASS = "per_class.csv"
INTERVALS = "intervals.csv"

# report
DATA_CARD = "data_card.html"
# In the folder of each architecture.
REPORT_PAGE = "report.html"
LABEL_ERRORS = "label_errors.csv"
MISTAKES = "mistakes.csv"

# register
LEADERBOARD = "leaderboard.csv"
# The links to the views in MLflow, beside the scratch folders of the stages.
LINKS = "links.json"

# In artifacts/, beside the output folders: the latency of each network on the machine that measured it.
LATENCIES = "latency.csv"

# A folder of the project, outside the outputs of the stages, with a note about each model that has had a champion.
CHAMPION_NOTES = "artifacts/.cache/champion"
