"""Pair statistics with every optional field, for tests that run over all losses."""

import torch
from torch import Tensor

from prefopt_ray.losses.stats import PairStats


def random_stats(*, pairs: int, seed: int, dtype: torch.dtype = torch.float64) -> PairStats:
    """Log-probs of -1 to -31 nats over 1 to 39 tokens, policy and reference independent of each other."""
    draw = torch.Generator().manual_seed(seed)
    logps = [-30 * torch.rand(pairs, generator=draw, dtype=dtype) - 1 for _ in range(4)]
    tokens = torch.randint(1, 40, (2, pairs), generator=draw)
    return full_stats(*logps, tokens=(tokens[0], tokens[1]), seed=seed)


def full_stats(*logps: Tensor, tokens: tuple[Tensor, Tensor], seed: int = 0) -> PairStats:
    """The four summed log-probs, and the other fields such as they could be; they do not depend on the policy."""
    draw = torch.Generator().manual_seed(seed + 1000)
    count, dtype = len(logps[0]), logps[0].dtype

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw, dtype=dtype)

    shared = torch.minimum(*tokens)
    prefixes = [
        (logp * shared / own).detach() for logp, own in zip(logps, (*tokens, *tokens), strict=True)
    ]
    return PairStats(
        torch.arange(count), *logps, *tokens, *prefixes,
        chosen_token_sq=uniform(-1, -0.1) * tokens[0], rejected_token_sq=uniform(-1, -0.1) * tokens[1],
        chosen_kl=uniform(0, 3), rejected_kl=uniform(0, 3), mismatched_drift=uniform(-1, 4),
        chosen_score=uniform(-2, 2), rejected_score=uniform(-2, 2),
    )  # fmt: skip
