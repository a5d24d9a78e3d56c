"""The fetch stage, which decodes, validates and packs the labelled images of data/ or of a torchvision data set."""

import textwrap
from typing import TYPE_CHECKING

from convoy.core.csv_file import write_csv
from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir
from convoy.data.decode_pool import start_fork_server
from convoy.data.decode_worker import decoding_fingerprint
from convoy.data.sources.base import DatasetConfig
from pipeline.stage import Stage, main, print_limited

if TYPE_CHECKING:
    from convoy.data.card.summary import FetchSummary

SIZES = ("source_height", "source_width", "height", "width", "channels")
CLASSES_WIDTH = 100  # maximum width of the printed class names, in characters


def fetch(stage: Stage) -> None:
    """Decode, validate and pack the labelled images."""
    start_fork_server()
    # Each decode worker imports this module again. With these imports at its top that took 1.0 s instead of 0.3 s.
    from convoy.data.card.card import write_fetch_card
    from convoy.data.card.summary import FetchSummary
    from convoy.data.data_lock import DataLock, check_source, compute_version
    from convoy.data.ingest import FetchConfig, TooManyInvalidImages, ingest
    from convoy.data.sources.folder import read_folder
    from convoy.data.sources.torchvision import read_torchvision

    params = stage.validate(DatasetConfig, "dataset")
    limits = stage.validate(FetchConfig, "fetch")
    origin = check_source(stage.root, params)
    lock_file = stage.root / "data.lock"
    lock = DataLock.load(lock_file, params.name)
    artifacts = stage.project_root / "artifacts"
    decoded = (
        artifacts
        / ".cache/decoded"
        / params.name
        / decoding_fingerprint(params.longest_side, limits.max_pixels, params.first_page)
    )
    cache = CacheDir(decoded, artifacts / "fetch")

    if params.torchvision is None:
        source = read_folder(stage.root / "data", params)
    else:
        source = read_torchvision(params.torchvision, stage.project_root / "downloads" / params.name)
    labels = source.labels or None
    lock = lock.check(params.name, source.classes, labels)
    rejected = stage.folder.parent / "rejected.csv"
    rejected.unlink(missing_ok=True)
    try:
        result = ingest(source, params, limits, lock, stage.scratch, cache)
    except TooManyInvalidImages as error:
        write_csv(error.quarantine, rejected)
        raise ConvoyError(f"{error}\nThe complete list is artifacts/{rejected.name}") from error
    packed, quarantine, merged = result.packed, result.quarantine, result.merged
    write_csv(quarantine, stage.scratch / "quarantine.csv")
    write_csv(merged, stage.scratch / "merged.csv")

    version = compute_version(packed.table.iter_chunks("sha256", "label", "split"), len(quarantine), labels)
    lock = lock.add_version(packed.classes, version, packed.drawn, origin)
    summary = FetchSummary(
        name=params.name,
        classes=packed.classes,
        table=packed.table.read_columns("label", "split", "group", *SIZES),
        read_image=packed.read_image,
        quarantine=quarantine,
        merged=merged,
        changes=lock.describe_changes(),
        notes=result.notes,
    )
    write_fetch_card(summary, stage.scratch)
    print_summary(summary)
    # data.lock is written only after the output is published, so that it never lists data that no output held.
    stage.on_published.append(lambda: lock.save(lock_file, params.name))


def print_summary(summary: "FetchSummary") -> None:
    """Print the rejected images, the changes of the data, the notes and the number of images."""
    rejected = [f"{path} {reason}" for path, _, reason in summary.quarantine.itertuples(index=False)]
    print_limited("left out", rejected, "artifacts/fetch/quarantine.csv")
    print_limited("changed", summary.changes, "artifacts/fetch/card.md")
    print_limited("note", summary.notes, "artifacts/fetch/card.md")
    classes = textwrap.shorten(", ".join(summary.classes), CLASSES_WIDTH, placeholder=" ...")
    print(
        f"{summary.name}: {len(summary.table)} images of {len(summary.classes)} classes ({classes}),"
        f" {len(rejected)} left out, {len(summary.merged)} exact copies merged; see artifacts/fetch/card.md"
    )


if __name__ == "__main__":
    main("fetch", fetch)
