"""Promotion of the challenger to champion if the verdict of the gate is PROMOTE.

Only the register stage calls this module: there is no other way to promote a model.
"""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

import pandas as pd

import convoy
from convoy import models
from convoy.core.artifact_names import (
    CROSS_SPLIT_DUPLICATES,
    DATASET_INFO,
    IMAGE_TABLE,
    MANIFEST,
    PREDICTIONS,
    TRAINING_HASHES,
    WEIGHTS,
)
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.evaluation import latency
from convoy.inference.predictor import Predictor
from convoy.inference.test_set import predict_test_images
from convoy.promotion import champion, gate
from convoy.promotion.config import RegisterConfig
from convoy.promotion.evidence import ModelEvidence
from convoy.promotion.gate import Verdict
from convoy.promotion.paired_metric import score_predictions
from convoy.registry import model_loader, versions
from convoy.reporting import report
from convoy.tracking import provenance
from convoy.tracking.store import open_store
from convoy.training import hardware
from pipeline import sync_mlflow, verify
from pipeline.stage import Stage

# In artifacts/ this file holds the last verdict, and in a run the verdict on the model of that run.
FILE = "verdict.md"


@dataclasses.dataclass(frozen=True)
class Challenger:
    """The architecture that was chosen by validation, with its registered version."""

    architecture: str
    version: int  # of the registered model
    result: sync_mlflow.TrainedResult
    run: str  # run id in MLflow
    reason: str  # why this architecture was chosen


def promote(stage: Stage, params: RegisterConfig, candidate: Challenger, compared: int | None) -> None:
    """Compare a candidate with the champion and promote it if the verdict of the gate is PROMOTE.

    During the comparison the candidate has the alias `challenger`. It loses the alias if it is refused: by the gate,
    because of an earlier rollback, or because it can't be compared.

    Args:
        stage: The running register stage.
        params: The settings of the stage.
        candidate: The model to compare.
        compared: The version of the champion, or None if there never was a champion.

    Raises:
        ConvoyError: If the candidate can't be compared or verified.
    """
    try:
        _promote(stage, params, candidate, compared)
    except ConvoyError:
        with contextlib.suppress(ConvoyError), open_store(stage.project_root, params.name) as store:
            champion.drop_challenger(store, params.name, candidate.version)
        raise


def _promote(stage: Stage, params: RegisterConfig, candidate: Challenger, compared: int | None) -> None:
    name, version, key = params.name, candidate.version, _key(stage, params, candidate, compared)
    with open_store(stage.project_root, name) as store:
        summary, document = (
            versions.cached_verdict(store, name, version, key),
            versions.read_file(store, candidate.run, FILE),
        )
        if taken_back := champion.was_rolled_back(store, name, version):
            summary = f"HOLD: it was rolled back on {taken_back.time[:10]}: {taken_back.reason}"
            document = f"# HOLD: {candidate.architecture}, version {version}\n\n{summary}\n"
        elif not (summary or "").startswith("REJECT"):
            store.client.set_registered_model_alias(name, champion.CHALLENGER, str(version))
    if summary is None or document is None:
        # An old verdict must not be mistaken for the one of this run if the gate fails.
        (stage.project_root / "artifacts" / FILE).unlink(missing_ok=True)
        predictions = pd.read_parquet(candidate.result.evaluated / PREDICTIONS)
        verdict = run_gate(stage, params, candidate, predictions, compared)
        summary = verdict.summary()
        document = report.describe_verdict(verdict, candidate.architecture, version, compared, candidate.reason)
        with open_store(stage.project_root, name) as store:
            test_images, metric = gate.fingerprint_test_images(predictions), params.selection_metric
            score = score_predictions(metric, *predictions[["actual", "predicted"]].to_numpy(object).T)
            versions.log_file(store, candidate.run, FILE, document)
            # Shown in the leaderboard of the runs.
            store.client.set_tag(candidate.run, "verdict", f"{verdict.decision}, version {version}")
            versions.save_verdict(store, name, version, key, summary, test_images, metric, score)
    (stage.project_root / "artifacts" / FILE).write_text(document)
    print(f"{candidate.architecture}, version {version}: " + summary.replace("; ", ";\n  "))
    if taken_back or summary.startswith("REJECT"):
        with open_store(stage.project_root, name) as store:
            champion.drop_challenger(store, name, version)
    if not summary.startswith("PROMOTE"):
        stays = f"version {compared} stays the champion" if compared else "there is no champion yet"
        print(f"{stays}. Every reason is in artifacts/verdict.md, the rule in docs/promotion.md")
        return

    with open_store(stage.project_root, name) as store:
        images = stage.images(candidate.architecture)
        print(verify.verify(store, f"models:/{name}/{version}", candidate.result.evaluated, images))
        who, commit = provenance.user(stage.root), provenance.git_commit(stage.root)
        champion.set_champion(
            store,
            name,
            champion.PromotionEvent(champion.utc_now(), "promotion", compared, version, who, commit, summary),
        )
    print(f"{candidate.architecture} is now the champion: models:/{name}@champion, version {version}")


def run_gate(
    stage: Stage, params: RegisterConfig, candidate: Challenger, predictions: pd.DataFrame, compared: int | None
) -> Verdict:
    """Return the verdict of the gate on the current test images.

    Args:
        stage: The running register stage.
        params: The settings of the stage.
        candidate: The challenger.
        predictions: The predictions of the challenger for the test images.
        compared: The version of the champion, or None if there never was a champion.
    """
    prepared = stage.input("preprocess")
    info = DatasetInfo.load(prepared / DATASET_INFO)
    images = pd.read_parquet(prepared / IMAGE_TABLE).query("split == 'test'")
    paths = dict(zip(images["sha256"], images["path"], strict=True))
    near_duplicates = pd.read_parquet(prepared / CROSS_SPLIT_DUPLICATES)
    packed, pixels = PackedDataset.load(stage.input("fetch")), Images.load(prepared, "test").pixels
    record, seen = candidate.result.record(), (prepared / TRAINING_HASHES).read_text().split()
    device = hardware.select_device(record.trainer.accelerator)

    def contender(version: int) -> tuple[ModelEvidence, Predictor]:
        """Return a registered version with its predictions for the current test images, and its predictor."""
        with open_store(stage.project_root, params.name) as store:
            found = model_loader.find(store, f"models:/{params.name}/{version}")
            predictor, trained_on = (
                model_loader.load(found, store.scratch),
                model_loader.all_training_hashes(store, found),
            )
        predictor.classifier.to(device)
        name = f"{predictor.architecture} (version {version})"
        return ModelEvidence(name, predict_test_images(predictor, images, pixels, info, packed), trained_on), predictor

    with open_store(stage.project_root, params.name) as store:
        test_set_uses = versions.count_test_set_uses(
            store, params.name, candidate.version, gate.fingerprint_test_images(predictions)
        )
        champions = {event.after for event in champion.promotion_events(store, params.name)}
        ever = None
        if params.gate.mode == "non_inferior":
            ever = versions.best_ever(store, params.name, champions, params.selection_metric)
        seen_before = model_loader.training_hashes_of(store, params.name, record.earlier_data)
    trained_on = None if seen_before is None else [*seen, *seen_before]
    challenger = ModelEvidence(candidate.architecture, predictions, trained_on, record.parameters)
    if compared is None:
        return gate.decide(
            challenger,
            None,
            params.gate,
            test_set_uses=test_set_uses,
            metric=params.selection_metric,
            near_duplicates=near_duplicates,
            paths=paths,
            is_first=True,
        )
    old, predictor = contender(compared)
    settings, weights = record.settings, candidate.result.trained / WEIGHTS
    classifier = models.restore(record.architecture, settings, record.dataset_info, weights).to(device)
    challenger = dataclasses.replace(
        challenger, latency=latency.measure_latency_ratio(classifier, predictor.classifier)
    )
    old = dataclasses.replace(old, latency=1.0)
    best = contender(ever)[0] if ever is not None else None
    return gate.decide(
        challenger,
        old,
        params.gate,
        test_set_uses=test_set_uses,
        metric=params.selection_metric,
        best_champion=best,
        near_duplicates=near_duplicates,
        paths=paths,
    )


def _key(stage: Stage, params: RegisterConfig, candidate: Challenger, compared: int | None) -> str:
    """Return the fingerprint of everything that a verdict depends on, under which the verdict is cached."""
    files = [Path(__file__), *sorted(Path(convoy.__file__).parent.rglob("*.py"))]
    code = [sha256(file) for file in files]
    parts = [
        candidate.result.manifest_hash(),
        candidate.reason,
        compared,
        repr(params),
        sha256(stage.input("preprocess") / MANIFEST),
        code,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
