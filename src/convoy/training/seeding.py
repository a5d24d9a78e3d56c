"""The random numbers of a training step."""

import numpy as np
import torch


def seed_step(seed: int, global_step: int, rank: int, device: torch.device) -> None:
    """Seed torch's random generators for one step, so that a resumed training draws the same numbers.

    Args:
        seed: Seed of the training.
        global_step: Step, counted from 0 over the complete training.
        rank: Index of this process among those that train together.
        device: Device that trains.
    """
    state = np.random.SeedSequence([seed, global_step, rank]).generate_state(1, np.uint64)
    step_seed = int(state[0] >> 1)
    torch.default_generator.manual_seed(step_seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(step_seed)
