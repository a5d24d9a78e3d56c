"""fetch: the labelled images of data/, or a set that torchvision knows, decoded, judged and packed."""

import textwrap

from convoy.config import ConvoyError
from convoy.datacard import AsFound, write_fetch_card
from convoy.datasets.decoding import get_ready
from convoy.datasets.folders import read_folder
from convoy.datasets.history import History, check_source, version_of
from convoy.datasets.intake import Fetch, TooManyBad, take_in
from convoy.datasets.judging import decoding_fingerprint
from convoy.datasets.published import read_torchvision
from convoy.datasets.source import Dataset
from convoy.remembered import EarlierRun
from pipeline.stage import Stage, main, say

SIZES = ("source_height", "source_width", "height", "width", "channels")
NAMED = 100  # columns of the terminal for names of classes


def fetch(stage: Stage) -> None:
    """Decode, judge and pack the labelled images."""
    get_ready()
    params = stage.typed(Dataset, "dataset")
    limits = stage.typed(Fetch, "fetch")
    lock = stage.root / "data.lock"
    origin = check_source(stage.root, params)
    history = History.load(lock, params.name)
    made = stage.home / "artifacts"
    decoded = made / ".decoded" / params.name / decoding_fingerprint(params.longest_side)
    earlier = EarlierRun(decoded, made / "fetch")

    if params.torchvision is None:
        source = read_folder(stage.root / "data")
    else:
        source = read_torchvision(params.torchvision, stage.home / "downloads" / params.name)
    history.check(params.name, source.classes)
    refused = stage.folder.parent / "refused.csv"
    refused.unlink(missing_ok=True)
    try:
        intake = take_in(source, params, limits, history, stage.scratch, earlier)
    except TooManyBad as refusal:
        refusal.quarantine.to_csv(refused, index=False)
        raise ConvoyError(f"{refusal}\nThe whole list is artifacts/{refused.name}") from refusal
    packed, quarantine, merged = intake.packed, intake.quarantine, intake.merged
    quarantine.to_csv(stage.scratch / "quarantine.csv", index=False)
    merged.to_csv(stage.scratch / "merged.csv", index=False)

    version = version_of(packed.rows.pieces("sha256", "label", "split"), len(quarantine))
    history = history.grown(packed.classes, version, packed.drawn, origin)
    changes = history.changes()
    table = packed.rows.columns("label", "split", "group", *SIZES)
    found = AsFound(params.name, packed.classes, table, packed.image, quarantine, merged, changes, intake.notes)
    write_fetch_card(found, stage.scratch)
    tell(found)
    # not before: what never came into an output was never there
    stage.afterwards.append(lambda: history.save(lock, params.name))


def tell(found: AsFound) -> None:
    """On the terminal, what nobody should miss."""
    bad = [f"{path} {reason}" for path, _, reason in found.quarantine.itertuples(index=False)]
    say("left out", bad, "artifacts/fetch/quarantine.csv")
    say("changed", found.changes, "artifacts/fetch/card.md")
    say("note", found.notes, "artifacts/fetch/card.md")
    names = textwrap.shorten(", ".join(found.classes), NAMED, placeholder=" ...")
    print(
        f"{found.name}: {len(found.table)} images of {len(found.classes)} classes ({names}),"
        f" {len(found.quarantine)} left out, {len(found.merged)} exact copies merged; artifacts/fetch/card.md shows all"
    )


if __name__ == "__main__":
    main("fetch", fetch)
