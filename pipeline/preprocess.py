"""preprocess: images of one size, split for training, validation and test, and described."""

import json
from pathlib import Path

import numpy as np

from convoy.config import Seed
from convoy.datacard import AsPrepared, write_preprocess_card
from convoy.datasets.packed import Packed, Rows
from convoy.images import fit
from convoy.preprocessing import Preprocess, prepare
from convoy.remembered import Memory
from pipeline.stage import Stage, main

TOLD = 20  # notes on the terminal


def preprocess(stage: Stage) -> None:
    """Resize, split and describe the images."""
    params = stage.typed(Preprocess, "preprocess")
    seed = stage.typed(Seed, "seed")
    packed = Packed.load(stage.input("fetch"))
    made = stage.home / "artifacts"
    earlier = Memory(made / ".fitted" / packed.name, made / "preprocess")
    prepared = prepare(packed, params, seed, stage.scratch, earlier)
    prepared.near.to_csv(stage.scratch / "near.csv", index=False)
    prepared.withheld.to_csv(stage.scratch / "withheld.csv", index=False)

    rows = Rows(stage.scratch / "images.parquet")
    write_seen(rows, stage.scratch / "seen.txt")

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
    for note in prepared.notes[:TOLD]:
        print(f"note: {note}")
    if len(prepared.notes) > TOLD:
        print(
            f"note: and {len(prepared.notes) - TOLD} more of this kind; artifacts/preprocess/card.md counts all classes"
        )
    print(f"{packed.name}: " + ", ".join(f"{count} {name}" for name, count in profile.items()))


def write_seen(rows: Rows, file: Path) -> None:
    """The sha256 of each image that will train, or choose among epochs and models, in their order."""
    seen = bytearray()
    for piece in rows.pieces("sha256", "split"):
        seen += bytes.fromhex("".join(piece["sha256"][piece["split"] != "test"]))
    digests = np.sort(np.frombuffer(seen, "S32")).view("V32")  # 32 bytes each, where a text would take 113
    with file.open("w") as lines:
        lines.writelines(f"{digest.tobytes().hex()}\n" for digest in digests)


if __name__ == "__main__":
    main("preprocess", preprocess)
