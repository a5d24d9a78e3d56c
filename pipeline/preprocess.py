"""The preprocess stage, which resizes the images, splits them for training, validation and test, and describes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from convoy.core.artifact_names import (
    CHAMPION_NOTES,
    CROSS_SPLIT_DUPLICATES,
    DATA_PROFILE,
    IMAGE_TABLE,
    TRAINING_HASHES,
)
from convoy.core.csv_file import write_csv
from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir
from convoy.data.card.card import write_preprocess_card
from convoy.data.card.summary import PreprocessSummary
from convoy.data.image_io import center_crop_resize
from convoy.data.packed.packed_dataset import ImageTable, PackedDataset
from convoy.data.preprocessing import PreprocessConfig, SplitConfig, prepare, read_checksums, read_test_checksums
from convoy.data.splitting import describe_groups
from pipeline.stage import Stage, main, print_limited

# If MLflow has not answered in this time, the check is left to the gate, after the training.
CHECK_TIMEOUT_S = 60
CHECK_PREFIX = "convoy: check_champion: "


def preprocess(stage: Stage) -> None:
    """Resize, split and describe the images."""
    params = stage.validate(PreprocessConfig, "preprocess")
    split = stage.validate(SplitConfig, "split")
    packed = PackedDataset.load(stage.input("fetch"))
    artifacts = stage.project_root / "artifacts"
    cache = CacheDir(artifacts / ".cache/resized" / packed.name, artifacts / "preprocess")
    prepared = prepare(packed, params, split.seed, stage.scratch, cache)
    write_csv(prepared.near_duplicates, stage.scratch / "near_duplicates.csv")
    write_csv(prepared.excluded, stage.scratch / "excluded.csv")
    prepared.cross_split_duplicates.to_parquet(stage.scratch / CROSS_SPLIT_DUPLICATES, index=False)

    rows = ImageTable(stage.scratch / IMAGE_TABLE)
    training_hashes = read_checksums(rows, ["train", "val"])
    write_hashes(training_hashes, stage.scratch / TRAINING_HASHES)
    moved_count = len(np.intersect1d(training_hashes, read_test_checksums(cache.output)))
    check_champion(stage)

    info, table = prepared.info, rows.read_columns("label", "split", "group")
    groups = describe_groups(table)
    summary = PreprocessSummary(
        name=packed.name,
        **{key: getattr(info, key) for key in ("classes", "size", "channels", "mean", "std")},
        table=table,
        read_image=lambda row: center_crop_resize(packed.read_image(prepared.rows[row]), info.size, info.channels),
        read_original=packed.read_image_at,
        near_duplicates=prepared.near_duplicates,
        pair_count=prepared.pair_count,
        conflict_count=prepared.conflict_count,
        excluded=prepared.excluded,
        notes=prepared.notes,
        groups=groups,
    )
    write_preprocess_card(summary, stage.scratch)
    splits = table["split"].astype(str).value_counts()
    counts = {"images": len(rows), "classes": len(info.classes), **splits}
    profile = {name: int(count) for name, count in counts.items()} | {
        "near_duplicates": prepared.pair_count,
        "excluded": len(prepared.excluded),
    }
    data = {"name": packed.name, "source": packed.origin, "profile": profile, "split_seed": split.seed}
    (stage.scratch / DATA_PROFILE).write_text(json.dumps(data, indent=2) + "\n")
    # This note is printed but not written into the card, because an output must not depend on the previous one.
    if moved_count:
        print(
            f"note: {moved_count} test images of the last run are now used for training or validation, because"
            " split.seed, a fraction, or splits or groups in the data changed: models are no longer compared on them"
        )
    print_limited("note", prepared.notes, "artifacts/preprocess/card.md")
    if groups:
        print(f"{packed.name}: {groups}")
    print(f"{packed.name}: " + ", ".join(f"{count} {name}" for name, count in profile.items()))


def check_champion(stage: Stage) -> None:
    """Check before the training that the test images allow a comparison with the current champion.

    Otherwise the gate would refuse the comparison only after the training. MLflow is queried in a separate process,
    because its code is not part of what defines the output of this stage. The check is skipped in an experiment, which
    never promotes a model, and where no MLflow store was ever used.

    Raises:
        ConvoyError: If a model trained on these images could not be compared with the champion.
    """
    root = stage.project_root
    is_used = (root / "mlflow.db").exists() or any((root / CHAMPION_NOTES).glob("*.txt"))
    if os.environ.get("DVC_EXP_NAME") or not (is_used or os.environ.get("MLFLOW_TRACKING_URI")):
        return
    command = [sys.executable, "-m", "pipeline.check_champion", str(stage.scratch)]
    try:
        check = subprocess.run(command, cwd=stage.root, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return
    if check.returncode and CHECK_PREFIX in check.stderr:
        raise ConvoyError(check.stderr.rpartition(CHECK_PREFIX)[2].strip())
    if check.returncode:
        reason = check.stderr.strip().rpartition("\n")[2]
        print(f"note: the champion can't be checked now, and is compared after the training ({reason})")


def write_hashes(hashes: np.ndarray, file: Path) -> None:
    """Write sha256 checksums to a text file, one hexadecimal checksum per line."""
    with file.open("w") as lines:
        lines.writelines(f"{each.tobytes().hex()}\n" for each in hashes.view("V32"))


if __name__ == "__main__":
    main("preprocess", preprocess)
