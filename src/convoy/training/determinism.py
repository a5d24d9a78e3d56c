"""Operations of a network that torch can't compute deterministically on a GPU."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convoy.models.base import Classifier
from convoy.training.record import ResolvedTrainer

# Operations for which the documentation of `torch.use_deterministic_algorithms` lists a RuntimeError on CUDA tensors.
NONDETERMINISTIC = frozenset(
    {
        "_adaptive_avg_pool2d_backward",
        "_adaptive_avg_pool3d_backward",
        "_ctc_loss_backward",
        "_embedding_bag_dense_backward",
        "_upsample_bicubic2d_aa_backward",
        "_upsample_bilinear2d_aa_backward",
        "adaptive_max_pool2d_backward",
        "avg_pool3d_backward",
        "cumsum",
        "fractional_max_pool2d_backward",
        "fractional_max_pool3d_backward",
        "grid_sampler_2d_backward",
        "grid_sampler_3d_backward",
        "histc",
        "kthvalue",
        "max_pool3d_with_indices_backward",
        "max_unpool2d",
        "max_unpool3d",
        "median",
        "nanmedian",
        "put_",
        "reflection_pad1d_backward",
        "reflection_pad2d_backward",
        "reflection_pad3d_backward",
        "replication_pad1d_backward",
        "replication_pad2d_backward",
        "replication_pad3d_backward",
        "scatter_reduce",
        "upsample_bicubic2d_backward",
        "upsample_linear1d_backward",
        "upsample_trilinear3d_backward",
    }
)


class _OperationNames(TorchDispatchMode):
    """Collects the names of all operations that torch dispatches while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def resolve_determinism(hardware: ResolvedTrainer, classifier: Classifier) -> ResolvedTrainer:
    """Allow operations that are not deterministic to a network on a GPU that needs them, and to no other."""
    if hardware.accelerator != "gpu" or not list_nondeterministic(classifier):
        return hardware
    return dataclasses.replace(hardware, deterministic="warn")


def list_nondeterministic(classifier: Classifier) -> list[str]:
    """Return the names of the operations in a training step that are not deterministic on a GPU.

    The step runs on the meta device, which computes only shapes.
    """
    info = classifier.info
    with _OperationNames() as operations:
        shadow = copy.deepcopy(classifier).train().to("meta")
        pixels = torch.empty(2, info.size, info.size, info.channels, dtype=torch.uint8, device="meta")
        heads = shadow.weighted_heads(shadow.normalise(pixels))
        torch.stack([logits.float().logsumexp(dim=1).sum() for _, logits in heads]).sum().backward()
    return sorted(operations.names & NONDETERMINISTIC)
