"""The oracle of the embedded bandit: a softmax over free numbers in float64, Adam written out, no model and no engine.

Many bandits are trained side by side, each row with a loss, a temperature and comparisons of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.losses.stats import PairStats

COLUMNS = 12  # comparisons per step: a multiple of every set's size, so that full batches have equal weights
MINIBATCH = 9


@dataclass(frozen=True)
class Run:
    """One bandit: full batches of `observed`; or, as replicate number r, nine draws of it with replacement per step."""

    loss: str
    observed: tuple[tuple[int, int], ...]  # winner, loser
    tau: float
    replicate: int | None = None


def trained(runs: Sequence[Run], *, at: Iterable[int], learning_rate: float = 0.01) -> dict[int, Tensor]:
    """The policies (len(runs), 3) after the steps `at`, from the uniform policy, which is the reference.

    Runs must come grouped by loss, and replicates must not share a group with full batches.
    """
    groups = [list(group) for _, group in groupby(runs, key=lambda run: (run.loss, run.replicate is None))]
    at, generator = sorted(at), torch.Generator().manual_seed(0)
    theta = torch.zeros(len(runs), 3, dtype=torch.float64)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)  # Adam's moments
    drawing = [_Drawing(group) for group in groups]
    seen = {}
    for step in range(1, at[-1] + 1):
        parts = theta.split([len(group) for group in groups])
        slope = torch.cat([draws.slope(part, generator) for draws, part in zip(drawing, parts, strict=True)])
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        theta = theta - learning_rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        if step in at:
            seen[step] = theta.softmax(-1)
    return seen


class _Drawing:
    """The gradient of one group of runs, and the comparisons it sees."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._loss, self._minibatch = loss_function(runs[0].loss), runs[0].replicate is not None
        self._columns = MINIBATCH if self._minibatch else COLUMNS
        repeated = [list(run.observed) * (COLUMNS // len(run.observed)) for run in runs]
        self._winners, self._losers = torch.tensor(repeated).unbind(-1)  # (R, 12) each
        self._tau = torch.tensor([run.tau for run in runs], dtype=torch.float64).repeat_interleave(self._columns)
        self._zero = torch.zeros(len(runs) * self._columns, dtype=torch.float64)
        self._one = torch.ones(len(runs) * self._columns, dtype=torch.int64)

    def slope(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """theta (R, 3) -> gradient (R, 3) of each run's mean loss."""
        winners, losers = self._winners, self._losers
        if self._minibatch:
            drawn = torch.randint(COLUMNS, (len(theta), MINIBATCH), generator=generator)
            winners, losers = winners.gather(1, drawn), losers.gather(1, drawn)
        free = theta.clone().requires_grad_()
        drift = free.log_softmax(-1) - torch.zeros_like(free).log_softmax(-1)
        sides = drift.gather(1, winners).flatten(), drift.gather(1, losers).flatten()
        losses, _ = self._loss(PairStats(self._one, *sides, self._zero, self._zero, self._one, self._one),
                               {"beta": self._tau}, None)  # fmt: skip
        return torch.autograd.grad(losses.sum() / self._columns, free)[0]
