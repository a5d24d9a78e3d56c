"""promote: the challenger judged beside the champion, and moved into its place if the gate says PROMOTE.

Part of the register stage, and of nothing else: there is no other way to promote.
"""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

import pandas as pd

from convoy import champion, gate, hardware, models, registry, report, served, timing, tracking
from convoy.batches import Images
from convoy.comparison import answers
from convoy.config import ConvoyError
from convoy.datasets.packed import Packed
from convoy.gate import Contender, Verdict
from convoy.hashes import sha256
from convoy.predictor import Predictor
from convoy.promotion import Register
from convoy.task import Task
from pipeline import sync, verify
from pipeline.stage import MARK, Stage

FILE = "verdict.md"  # in artifacts/ the last verdict, in a run that of its model


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The best of the architectures by validation."""

    architecture: str
    version: int  # of the registered model
    result: sync.Result
    run: str  # its id in MLflow


def promote(stage: Stage, params: Register, candidate: Candidate, compared: int | None) -> None:
    """Judge the candidate beside version `compared` of the model (None: there never was a champion), and act on it.

    Meanwhile it has the alias `challenger`, which it loses where it is refused: by the gate, by a rollback before, or
    as it can't be compared.
    """
    try:
        _promote(stage, params, candidate, compared)
    except ConvoyError:
        with contextlib.suppress(ConvoyError), tracking.store(stage.home, params.name) as store:
            champion.drop_challenger(store, params.name, candidate.version)
        raise


def _promote(stage: Stage, params: Register, candidate: Candidate, compared: int | None) -> None:
    name, version, key = params.name, candidate.version, _key(stage, params, candidate, compared)
    with tracking.store(stage.home, name) as store:
        said, written = registry.judged(store, name, version, key), registry.read_file(store, candidate.run, FILE)
        if taken_back := champion.was_rolled_back(store, name, version):
            said = f"HOLD: it was rolled back on {taken_back.time[:10]}: {taken_back.reason}"
            written = f"# HOLD: {candidate.architecture}, version {version}\n\n{said}\n"
        elif not (said or "").startswith("REJECT"):
            store.client.set_registered_model_alias(name, champion.CHALLENGER, str(version))
    if said is None or written is None:
        (stage.home / "artifacts" / FILE).unlink(missing_ok=True)  # that of another day is not taken for today's
        predictions = pd.read_parquet(candidate.result.evaluated / "predictions.parquet")
        verdict = judge(stage, params, candidate, predictions, compared)
        said = verdict.summary()
        written = report.describe_verdict(verdict, candidate.architecture, version, compared)
        with tracking.store(stage.home, name) as store:
            accuracy = float((predictions["actual"] == predictions["predicted"]).mean())
            registry.log_file(store, candidate.run, FILE, written)
            registry.keep_verdict(store, name, version, key, said, gate.fingerprint(predictions), accuracy)
    (stage.home / "artifacts" / FILE).write_text(written)
    print(f"{candidate.architecture}, version {version}: " + said.replace("; ", ";\n  "))
    if taken_back or said.startswith("REJECT"):
        with tracking.store(stage.home, name) as store:
            champion.drop_challenger(store, name, version)
    if not said.startswith("PROMOTE"):
        stays = f"version {compared} stays the champion" if compared else "there is no champion yet"
        print(f"{stays}. Every reason is in artifacts/verdict.md, the rule in docs/promotion.md")
        return

    with tracking.store(stage.home, name) as store:
        print(verify.verify(store, f"models:/{name}/{version}", candidate.result.evaluated, stage.input("preprocess")))
        who, commit = tracking.who(stage.root), tracking.commit(stage.root)
        champion.move(store, name, champion.Event(champion.now(), "promotion", compared, version, who, commit, said))
    print(f"{candidate.architecture} is now the champion: models:/{name}@champion, version {version}")


def judge(
    stage: Stage, params: Register, candidate: Candidate, predictions: pd.DataFrame, compared: int | None
) -> Verdict:
    """The verdict of the gate, on today's test images."""
    prepared = stage.input("preprocess")
    task = Task.load(prepared / "task.json")
    images = pd.read_parquet(prepared / "images.parquet").query("split == 'test'")
    paths = dict(zip(images["sha256"], images["path"], strict=True))
    alike = pd.read_parquet(prepared / "alike.parquet")
    packed, pixels = Packed.load(stage.input("fetch")), Images.load(prepared, "test").pixels
    record, seen = candidate.result.record(), (prepared / "seen.txt").read_text().split()
    device = hardware.device(record["trainer"]["accelerator"])
    before = [digest for digest in record["init"].get("lineage", []) if digest != record["data"]["digest"]]

    def contender(version: int) -> tuple[Contender, Predictor]:
        """A registered version, its answers made now."""
        with tracking.store(stage.home, params.name) as store:
            found = served.find(store, f"models:/{params.name}/{version}")
            predictor, trained_on = served.load(found, store.scratch), served.seen_ever(store, found)
        predictor.classifier.to(device)
        name = f"{predictor.architecture} (version {version})"
        return Contender(name, answers(predictor, images, pixels, task, packed), trained_on), predictor

    with tracking.store(stage.home, params.name) as store:
        looks = registry.count_looks(store, params.name, candidate.version, gate.fingerprint(predictions))
        champions = {event.after for event in champion.events(store, params.name)}
        ever = registry.best_ever(store, params.name, champions) if params.gate.mode == "non_inferior" else None
        seen_before = served.seen_with(store, params.name, before)
    trained_on = None if seen_before is None else [*seen, *seen_before]
    challenger = Contender(candidate.architecture, predictions, trained_on, record["parameters"])
    if compared is None:
        return gate.judge(challenger, None, params.gate, looks=looks, alike=alike, paths=paths, first=True)
    old, predictor = contender(compared)
    settings, weights = record["settings"], candidate.result.trained / "weights.safetensors"
    classifier = models.restore(record["architecture"], settings, task, weights).to(device)
    challenger = dataclasses.replace(challenger, latency=timing.latency_ratio(classifier, predictor.classifier))
    old = dataclasses.replace(old, latency=1.0)
    best = contender(ever)[0] if ever is not None else None
    return gate.judge(challenger, old, params.gate, looks=looks, best=best, alike=alike, paths=paths)


def _key(stage: Stage, params: Register, candidate: Candidate, compared: int | None) -> str:
    """The hash of what a verdict depends on: where it is as before, the verdict need not be made again."""
    files = [Path(__file__), *sorted(Path(gate.__file__).parent.rglob("*.py"))]  # all of this library
    code = [sha256(file) for file in files]
    parts = [candidate.result.mark(), compared, repr(params), sha256(stage.input("preprocess") / MARK), code]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
