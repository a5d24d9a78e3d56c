"""The fetch stage, which decodes, validates and packs the labelled images of data/ or of a torchvision data set."""

import textwrap

from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir
from convoy.data.card.card import write_fetch_card
from convoy.data.card.summary import FetchSummary
from convoy.data.data_lock import DataLock, check_source, version_of
from convoy.data.decode_pool import get_ready
from convoy.data.decode_worker import decoding_fingerprint
from convoy.data.ingest import FetchConfig, TooManyInvalidImages, ingest
from convoy.data.sources.base import DatasetConfig
from convoy.data.sources.folder import read_folder
from convoy.data.sources.torchvision import read_torchvision
from pipeline.stage import Stage, main, print_limited

SIZES = ("source_height", "source_width", "height", "width", "channels")
NAMED = 100  # maximum width of the printed class names, in characters


def fetch(stage: Stage) -> None:
    """Decode, validate and pack the labelled images."""
    get_ready()
    params = stage.typed(DatasetConfig, "dataset")
    limits = stage.typed(FetchConfig, "fetch")
    lock = stage.root / "data.lock"
    origin = check_source(stage.root, params)
    history = DataLock.load(lock, params.name)
    made = stage.project_root / "artifacts"
    decoded = made / ".decoded" / params.name / decoding_fingerprint(params.longest_side)
    earlier = CacheDir(decoded, made / "fetch")

    if params.torchvision is None:
        source = read_folder(stage.root / "data")
    else:
        source = read_torchvision(params.torchvision, stage.project_root / "downloads" / params.name)
    history.check(params.name, source.classes)
    refused = stage.folder.parent / "refused.csv"
    refused.unlink(missing_ok=True)
    try:
        intake = ingest(source, params, limits, history, stage.scratch, earlier)
    except TooManyInvalidImages as refusal:
        refusal.quarantine.to_csv(refused, index=False)
        raise ConvoyError(f"{refusal}\nThe whole list is artifacts/{refused.name}") from refusal
    packed, quarantine, merged = intake.packed, intake.quarantine, intake.merged
    quarantine.to_csv(stage.scratch / "quarantine.csv", index=False)
    merged.to_csv(stage.scratch / "merged.csv", index=False)

    version = version_of(packed.rows.pieces("sha256", "label", "split"), len(quarantine))
    history = history.grown(packed.classes, version, packed.drawn, origin)
    changes = history.changes()
    table = packed.rows.columns("label", "split", "group", *SIZES)
    found = FetchSummary(params.name, packed.classes, table, packed.image, quarantine, merged, changes, intake.notes)
    write_fetch_card(found, stage.scratch)
    tell(found)
    # data.lock is written only after the output is published, so that it never lists data that no output held.
    stage.on_published.append(lambda: history.save(lock, params.name))


def tell(found: FetchSummary) -> None:
    """Print the rejected images, the changes of the data and a summary."""
    bad = [f"{path} {reason}" for path, _, reason in found.quarantine.itertuples(index=False)]
    print_limited("left out", bad, "artifacts/fetch/quarantine.csv")
    print_limited("changed", found.changes, "artifacts/fetch/card.md")
    print_limited("note", found.notes, "artifacts/fetch/card.md")
    names = textwrap.shorten(", ".join(found.classes), NAMED, placeholder=" ...")
    print(
        f"{found.name}: {len(found.table)} images of {len(found.classes)} classes ({names}),"
        f" {len(found.quarantine)} left out, {len(found.merged)} exact copies merged; artifacts/fetch/card.md shows all"
    )


if __name__ == "__main__":
    main("fetch", fetch)
