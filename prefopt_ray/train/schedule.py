"""Learning-rate factors and data order: pure functions of (step, seed), so a resumed trial continues them."""

import math
from functools import lru_cache

import numpy as np

from prefopt_ray.trial import TrainingConfig


def rate_factor(training: TrainingConfig, step: int) -> float:
    """Factor on the learning rate for the step about to be made (`step` steps are done), in (0, 1].

    The warm-up rises linearly and its first step is not zero. Decay runs over `total_steps`, wherever
    training stops.
    """
    warmup, total = training.warmup_steps, training.total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - warmup)  # 0 at the end of the warm-up, 1 at the end
    if training.schedule == "linear":
        return 1.0 - share
    if training.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0


def batch_indices(step: int, *, pairs: int, batch: int, seed: int) -> np.ndarray:
    """(batch,) indices of the step's pairs. Epochs are permutations drawn from (seed, epoch), laid end to end."""
    first = step * batch
    picked = []
    for epoch in range(first // pairs, (first + batch - 1) // pairs + 1):
        start, stop = max(0, first - epoch * pairs), min(pairs, first + batch - epoch * pairs)
        picked.append(_epoch_order(pairs, seed=seed, epoch=epoch)[start:stop])
    return np.concatenate(picked)


@lru_cache(maxsize=4)  # drawn anew at every step, an epoch would cost the square of its pairs
def _epoch_order(pairs: int, *, seed: int, epoch: int) -> np.ndarray:
    """(pairs,) the epoch's rows in their order, not to be written to."""
    order = np.random.default_rng([seed, epoch]).permutation(pairs)
    order.flags.writeable = False
    return order
