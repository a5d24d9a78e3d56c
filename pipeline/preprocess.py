"""preprocess: images of one size, split for training, validation and test, and described."""

import json
from pathlib import Path

import numpy as np

from convoy.config import Seed
from convoy.datacard import AsPrepared, write_preprocess_card
from convoy.datasets.packed import TABLE, Packed, Rows
from convoy.images import fit
from convoy.preprocessing import Preprocess, digests_of, prepare, tested_in
from convoy.remembered import EarlierRun
from pipeline.stage import Stage, main, say


def preprocess(stage: Stage) -> None:
    """Resize, split and describe the images."""
    params = stage.typed(Preprocess, "preprocess")
    seed = stage.typed(Seed, "seed")
    packed = Packed.load(stage.input("fetch"))
    made = stage.home / "artifacts"
    earlier = EarlierRun(made / ".fitted" / packed.name, made / "preprocess")
    prepared = prepare(packed, params, seed, stage.scratch, earlier)
    prepared.near.to_csv(stage.scratch / "near.csv", index=False)
    prepared.withheld.to_csv(stage.scratch / "withheld.csv", index=False)
    prepared.alike.to_parquet(stage.scratch / "alike.parquet", index=False)

    rows = Rows(stage.scratch / TABLE)
    seen = digests_of(rows, ["train", "val"])
    write_digests(seen, stage.scratch / "seen.txt")
    moved = len(np.intersect1d(seen, tested_in(earlier.output)))

    task, table = prepared.task, rows.columns("label", "split")
    card = AsPrepared(
        name=packed.name,
        **{key: getattr(task, key) for key in ("classes", "size", "channels", "mean", "std")},
        table=table,
        images=lambda row: fit(packed.image(prepared.rows[row]), task.size, task.channels),
        found=packed.named,
        near=prepared.near,
        pairs=prepared.pairs,
        doubtful=prepared.doubtful,
        withheld=prepared.withheld,
        notes=prepared.notes,
    )
    write_preprocess_card(card, stage.scratch)
    splits = table["split"].astype(str).value_counts()
    counts = {"images": len(rows), "classes": len(task.classes), **splits}
    profile = {name: int(count) for name, count in counts.items()} | {
        "near_duplicates": prepared.pairs,
        "withheld": len(prepared.withheld),
    }
    described = {"name": packed.name, "source": packed.origin, "profile": profile}
    (stage.scratch / "data.json").write_text(json.dumps(described, indent=2) + "\n")
    if moved:  # not in the card: what an output holds does not depend on the last one
        print(
            f"note: of the last run's test images {moved} train or choose among models now, by another seed or fraction"
            " than then, or as folders, tables or groups say now: models are not compared by them any more"
        )
    say("note", prepared.notes, "artifacts/preprocess/card.md")
    print(f"{packed.name}: " + ", ".join(f"{count} {name}" for name, count in profile.items()))


def write_digests(digests: np.ndarray, file: Path) -> None:
    with file.open("w") as lines:
        lines.writelines(f"{digest.tobytes().hex()}\n" for digest in digests.view("V32"))


if __name__ == "__main__":
    main("preprocess", preprocess)
