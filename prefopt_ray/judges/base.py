"""What a judge is: something that scores completions, or says which of two is better.

Knows no policy, no sweep and no files. Judges that score are asked once per completion; judges that compare are
asked in both orders (see `tournament`), since most of them favour a side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from prefopt_ray.pairs.shapes import Message
from prefopt_ray.train.scorers import Completion

# Told how many answers are there; what it raises ends the judging (a time limit, Ctrl-C).
Advance = Callable[[int], None]


def silent(done: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Prompt:
    """What the policy was asked: as one text, and as turns where it was a conversation."""

    text: str
    turns: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Tally:
    """What judging took and what went wrong, beside the verdicts themselves."""

    asked: int = 0  # requests sent, retries included
    cached: int = 0  # answers that were known
    unparsable: int = 0  # answers without a verdict
    unanswered: int = 0  # no answer after every retry
    not_asked: int = 0  # the cost cap was reached before
    usd: float | None = None  # None: no prices are given
    example: str = ""  # the first unparsable answer, shortened


@dataclass(frozen=True)
class Preferences:
    """(N,) share in [0, 1] with which the first of two completions is preferred; NaN where there is no verdict."""

    shares: np.ndarray
    tally: Tally = field(default_factory=Tally)


class PointwiseJudge(Protocol):
    """Scores each completion by itself; higher is better."""

    name: str

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], *, advance: Advance) -> np.ndarray:
        """(N,) float64, finite. Raises JudgeError."""
        ...


class PairwiseJudge(Protocol):
    """Says which of two completions is better."""

    name: str

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], *, advance: Advance
    ) -> Preferences:
        """One verdict per row, in the order in which the completions are shown. Raises JudgeError."""
        ...


Judge = PointwiseJudge | PairwiseJudge


def is_pointwise(judge: Judge) -> bool:
    return hasattr(judge, "score")
