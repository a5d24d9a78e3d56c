"""preprocess: images of one size, split for training, validation and test, and described."""

import json

from convoy.config import Whole
from convoy.datacard import AsPrepared, write_preprocess_card
from convoy.datasets.packed import Packed
from convoy.images import fit
from convoy.preprocessing import Preprocess, prepare
from pipeline.stage import Stage, main


def preprocess(stage: Stage) -> None:
    """Resize, split and describe the images."""
    params = stage.typed(Preprocess, "preprocess")
    seed = stage.typed(Whole, "seed")
    packed = Packed.load(stage.input("fetch"))
    prepared = prepare(packed, params, seed, stage.scratch)
    prepared.near.to_csv(stage.scratch / "near.csv", index=False)
    prepared.withheld.to_csv(stage.scratch / "withheld.csv", index=False)

    seen = prepared.table.query("split != 'test'")["sha256"]  # what will train, or choose among epochs and models
    (stage.scratch / "seen.txt").write_text("\n".join(sorted(seen)) + "\n")

    task, paths = prepared.task, prepared.table["path"]
    card = AsPrepared(
        name=packed.name,
        **{key: getattr(task, key) for key in ("classes", "size", "channels", "mean", "std")},
        table=prepared.table,
        images=lambda row: fit(packed.named(paths[row]), task.size, task.channels),
        found=packed.named,
        near=prepared.near,
        withheld=prepared.withheld,
        notes=prepared.notes,
    )
    write_preprocess_card(card, stage.scratch)
    counts = {"images": len(paths), "classes": len(task.classes), **prepared.table["split"].value_counts()}
    profile = {name: int(count) for name, count in counts.items()} | {
        "near_duplicates": len(prepared.near),
        "withheld": len(prepared.withheld),
    }
    described = {"name": packed.name, "source": packed.origin, "profile": profile}
    (stage.scratch / "data.json").write_text(json.dumps(described, indent=2) + "\n")
    for note in prepared.notes:
        print(f"note: {note}")
    print(f"{packed.name}: " + ", ".join(f"{count} {name}" for name, count in profile.items()))


if __name__ == "__main__":
    main("preprocess", preprocess)
