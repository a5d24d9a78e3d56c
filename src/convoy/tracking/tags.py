"""Names of tags in MLflow, for modules that read MLflow's data without importing MLflow."""

# Tag of a run or a registered version: the sha256 of each of its files, as JSON.
CHECKSUMS_TAG = "convoy.sha256"
# Tag of a run: its position among the runs of the newest data, such as "001".
RANK_TAG = "rank"
# Tag of a registered version: the summary of the gate's verdict.
VERDICT = "convoy.verdict"
