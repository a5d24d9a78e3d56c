"""The settings of a training run on a Ray cluster."""

from typing import Literal

from convoy.core.config import NonNegativeFloat, PositiveFloat, PositiveInt, schema
from convoy.training.hardware import Duration, Threads, TrainerConfig


@schema
class ClusterConfig:
    """Settings of conf/trainer/ray.yaml, which take the place of those in `TrainerConfig`."""

    # HOST:PORT of the head node; "auto" for the one in RAY_ADDRESS, or else the cluster of this machine; "local" for a
    # new one.
    address: str
    workers: PositiveInt  # processes that train together
    use_gpu: bool  # whether each worker gets a GPU
    resources: dict[str, PositiveFloat]  # of each worker, as in `ray status`
    storage: str | None  # folder or s3:// URL for checkpoints, which all nodes can use; by default in the project
    max_upload_gb: NonNegativeFloat  # images above this are not copied to the nodes, but read from a shared disk
    wait_minutes: NonNegativeFloat  # for nodes that are missing or were lost
    # As in `TrainerConfig`.
    precision: Literal["auto", "32-true", "bf16-mixed"]
    sync_batchnorm: bool
    max_time: Duration | None
    profiler: Literal["simple", "advanced"] | None
    compile: bool
    threads: Threads | Literal["auto"]

    @property
    def request(self) -> dict[str, float]:
        """Amount of each of Ray's resources that a worker reserves."""
        return {"CPU": 1} | ({"GPU": 1} if self.use_gpu else {}) | self.resources

    @property
    def worker_trainer(self) -> TrainerConfig:
        """Hardware settings of a worker, as those of a machine with one device."""
        return TrainerConfig(
            accelerator="gpu" if self.use_gpu else "cpu",
            devices=1,
            num_nodes=self.workers,
            strategy="auto",
            precision=self.precision,
            sync_batchnorm=self.sync_batchnorm,
            max_time=self.max_time,
            profiler=self.profiler,
            compile=self.compile,
            threads=self.threads,
        )
