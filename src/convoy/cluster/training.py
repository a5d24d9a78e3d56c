"""A training run on a Ray cluster: what it runs on, its progress, and its result."""

import contextlib
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convoy.cluster.config import ClusterConfig
from convoy.cluster.connection import Patience, connect, reserve
from convoy.core.errors import ConvoyError, describe_error
from convoy.data.packed.arrays import Images
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.datamodule import ImageDataModule
from convoy.training.record import ResolvedTrainer
from convoy.training.trainer import TrainResult

# Ray is an extra.
if TYPE_CHECKING:
    from ray.util.queue import Queue

    from convoy.cluster.worker import SharedImages

# Packages whose versions must be those of this machine: they decide the results, and what a worker can read.
PACKAGES = ("numpy", "pytorch-lightning", "torch")
# Failures of workers since the last checkpoint after which a training run ends with an error.
MAX_FAILURES = 3
POLL_S = 1.0
SAME_LOCK = "install the same requirements.lock and cluster.lock on all nodes"

Rows = list[dict[str, float]]


@contextlib.contextmanager
def open_cluster(config: ClusterConfig, storage: Path) -> Iterator["Cluster"]:
    """Connect to the cluster for a training run.

    Args:
        config: Settings of the cluster.
        storage: Folder for checkpoints if the settings name none.
    """
    with connect(config):
        given = config.storage or str(storage)
        yield Cluster(config, given if "://" in given else str(Path(given).absolute()))


class Cluster:
    """A Ray cluster to which this process is connected.

    Args:
        config: Settings of the cluster.
        storage: Folder or URL for checkpoints.
    """

    def __init__(self, config: ClusterConfig, storage: str) -> None:
        self.config = config
        self.storage = storage
        self.patience = Patience(config)
        self.finished: Any = None

    def describe_worker(self, classifier: Classifier) -> tuple[ResolvedTrainer, dict[str, str | int]]:
        """Return the hardware for a training run by a node of the cluster, and the environment there.

        This waits until the cluster has room for a worker.

        Raises:
            ConvoyError: If the versions of packages there differ from those of this machine.
        """
        import ray

        from convoy.cluster import worker

        request = self.config.request
        task = ray.remote(worker.describe_worker).options(**reserve(request))
        asked = task.remote(self.config.worker_trainer, classifier, request["CPU"])
        is_reported = False
        while not ray.wait([asked], timeout=POLL_S)[0]:
            self.patience.check()
            if not is_reported and any(ray.available_resources().get(name, 0) < request[name] for name in request):
                print("the cluster is busy: the training waits for a free place", flush=True)
                is_reported = True
        try:
            hardware, environment = ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise explain(error) from error
        check_versions(environment)
        return hardware, environment

    def fit(
        self,
        name: str,
        classifier: Classifier,
        data: ImageDataModule,
        params: TrainConfig,
        hardware: ResolvedTrainer,
        environment: Mapping[str, str | int],
        on_rows: Callable[[Rows], None] | None = None,
    ) -> TrainResult:
        """Train on the cluster, as `convoy.training.trainer.fit` does on one machine.

        A worker or node that is lost is replaced, and the training resumes from its last checkpoint. So does a training
        of the same name that was interrupted.

        Args:
            name: Name of the training, under which its checkpoints are found again.
            classifier: The network.
            data: Training and validation images.
            params: Settings that all architectures share.
            hardware: Hardware, precision and threads of a worker.
            environment: Environment of a worker, in which all must run.
            on_rows: Called with the history whenever there is a new checkpoint.

        Raises:
            ConvoyError: If the training can't run, or nodes were lost for good.
        """
        import ray
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from convoy.cluster import worker
        from convoy.cluster.relay import Relay

        # On this node, which outlives all others for this training.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        job = worker.Job(
            classifier,
            self.share(data.train, "train"),
            self.share(data.val, "val"),
            params,
            hardware,
            environment,
            messages,
        )
        trainer = TorchTrainer(
            worker.train,  # type: ignore[arg-type]
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=self.config.workers,
                use_gpu=self.config.use_gpu,
                resources_per_worker=self.config.request,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=self.storage,
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                # `_follow` ends a training run that fails again and again.
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[Relay(messages)],  # type: ignore[list-item]
            ),
        )
        done: Future[Any] = Future()
        threading.Thread(target=_run, args=[trainer.fit, done], daemon=True).start()
        self._follow(done, messages, on_rows)
        try:
            result = done.result()
        except Exception as error:
            raise explain(error) from error
        self.finished = result
        return result.return_value

    def _follow(self, done: "Future[Any]", messages: "Queue", on_rows: Callable[[Rows], None] | None) -> None:
        """Show what the workers report, until the training has ended."""
        from ray.util.queue import Empty

        kept, failures = f"the checkpoint is kept in {self.storage}, from where the same command resumes", 0
        while not done.done() or not messages.empty():
            try:
                message = messages.get(timeout=POLL_S)
            except Empty:
                self.patience.check(f"; {kept}")
                continue
            if "line" in message:
                print(message["line"], flush=True)
            elif "rows" in message:
                failures = 0
                if on_rows:
                    on_rows(message["rows"])
            elif message["is_final"]:
                raise ConvoyError(message["failure"])
            else:
                failures += 1
                if failures > MAX_FAILURES:
                    problem = f"workers failed {failures} times since the last checkpoint"
                    raise ConvoyError(f"{problem}: {message['failure']}; {kept}")
                print(f"a worker failed, and the training resumes: {message['failure']}", flush=True)

    def share(self, images: Images, split: str) -> "SharedImages":
        """Copy the images of a split into Ray's object store, or let workers read them where they are if it is large.

        Args:
            images: Images that were loaded from a folder.
            split: Name of the split.
        """
        import ray

        from convoy.cluster.worker import SharedImages

        assert isinstance(images.pixels, np.memmap)
        is_small = images.pixels.nbytes <= 1e9 * self.config.max_upload_gb
        pixels = ray.put(np.asarray(images.pixels)) if is_small else None
        return SharedImages(pixels, images.labels, Path(str(images.pixels.filename)).parent, split)

    def remove_checkpoints(self) -> None:
        """Remove the checkpoints of a training run that has ended."""
        self.finished.filesystem.delete_dir(self.finished.path)


def check_versions(environment: Mapping[str, str | int]) -> None:
    """Check that a worker has the versions of this machine.

    Args:
        environment: Environment of the worker, with the versions of `PACKAGES` and Python.

    Raises:
        ConvoyError: If a version differs.
    """
    own = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    if different := [name for name in own if own[name] != environment[name]]:
        values = ", ".join(f"{name} {own[name]} here, {environment[name]} there" for name in different)
        raise ConvoyError(f"versions differ between this machine and the cluster ({values}): {SAME_LOCK}")


def _run(work: Callable[[], Any], done: "Future[Any]") -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)


def explain(error: Exception) -> Exception:
    """Return the error of the user that is the cause of one of Ray, or else that error."""
    cause = getattr(error, "cause", None) or getattr(error, "controller_failure", None) or error
    if isinstance(cause, ConvoyError):
        return cause
    if isinstance(cause, ImportError):
        return ConvoyError(f"a node of the cluster lacks a package ({describe_error(cause, 200)}): {SAME_LOCK}")
    return error
