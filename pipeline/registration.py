"""Registration of the best result as a new version of the model, with its latency and an ONNX file."""

from collections.abc import Mapping
from pathlib import Path

import convoy
from convoy import models
from convoy.core.artifact_names import CALIBRATION, RECORD, TRAINING_HASHES, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.evaluation import latency
from convoy.inference import onnx_export, predictor
from convoy.registry import model_loader, verification, versions
from convoy.reporting import model_card
from convoy.tracking import runs
from convoy.tracking.store import TrackingStore
from convoy.training import hardware
from pipeline import verify
from pipeline.sync_mlflow import TrainedResult

PACKAGE = Path(convoy.__file__).parent


def measure_latencies(
    store: TrackingStore, run_ids: Mapping[str, str], results: Mapping[str, TrainedResult], challenger: str
) -> None:
    """Measure the latency of a single image of all networks on this machine, in turn, and log it to their runs.

    Args:
        store: The open MLflow store.
        run_ids: The ID of each network's run.
        results: The results of networks whose training did not fail.
        challenger: The network whose latency of a batch is measured, too.
    """
    device = hardware.select_device(next(iter(results.values())).record().trainer.accelerator)
    classifiers = {}
    for name, result in results.items():
        record = result.record()
        classifier = models.restore(name, record.settings, record.dataset_info, result.trained / WEIGHTS)
        classifiers[name] = classifier.to(device)
    timings = dict(zip(classifiers, latency.measure_latencies(list(classifiers.values()), "image"), strict=True))
    timings[challenger] |= latency.measure_latencies([classifiers[challenger]], "batch")[0]
    for name, found in timings.items():
        runs.log_latencies(store, run_ids[name], found, latency.describe_hardware(device))


def register_version(
    store: TrackingStore, name: str, result: TrainedResult, run: str, prepared: Path, images: Path
) -> int:
    """Register a result as a new version of a model, with an ONNX file if its predictions equal the evaluation.

    Args:
        store: The open MLflow store.
        name: The name of the model.
        result: The result to register.
        run: The id of its run in MLflow.
        prepared: The output folder of the preprocess stage.
        images: The folder with the images at the size of the network.

    Returns:
        The number of the version.
    """
    record = result.record()
    files = {
        "record": result.trained / RECORD,
        "weights": result.trained / WEIGHTS,
        "calibration": result.evaluated / CALIBRATION,
        "training_hashes": prepared / TRAINING_HASHES,
    }
    with model_loader.temporary(str(result.trained), store.scratch) as scratch:
        version = versions.register(
            store,
            name=name,
            run_id=run,
            identity=result.manifest_hash(),
            model=PACKAGE / "inference/pyfunc_model.py",
            files=files | export_onnx(record.architecture, files, result, images, scratch),
            code=PACKAGE,
            libraries=models.libraries(record.settings),
            step=record.best.epoch if record.best else 0,
        )
    store.client.update_registered_model(name, model_card.describe_model(name, record))
    return int(version.version)


def export_onnx(
    name: str, files: Mapping[str, Path], result: TrainedResult, images: Path, scratch: Path
) -> dict[str, Path]:
    """Export a model to an ONNX file in `scratch` and compare its predictions with the evaluation.

    Args:
        name: The name of the architecture, for messages.
        files: The files of the registered model.
        result: The result that the files belong to.
        images: The folder with the images at the size of the network.
        scratch: The folder to write into.

    Returns:
        The ONNX file as `{"onnx": path}`, or an empty dict if the export fails or its predictions differ from the
        evaluation.
    """
    for file in files.values():
        (scratch / file.name).symlink_to(file.absolute())
    model, (pixels, expected) = predictor.restore(scratch), verify.sample(result.evaluated, images)
    onnx = scratch / onnx_export.ONNX_FILE
    try:
        onnx_export.export(model, onnx)
        difference = onnx_export.max_difference(onnx, pixels, expected)
        if not difference <= verification.TOLERANCE:
            raise ConvoyError(
                f"its probabilities differ by up to {difference:.2g}, more than {verification.TOLERANCE:g}"
            )
    except ConvoyError as error:
        print(f"{name} is registered without {onnx.name}: {error}")
        return {}
    print(f"{name}: {onnx.name} {verify.describe(len(pixels), difference)}")
    return {"onnx": onnx}
