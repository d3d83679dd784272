"""What scores the policy's own samples: (prompts, completions) -> scores. The gold reward is the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Completion:
    """One sampled completion, its end-of-turn token removed."""

    text: str
    tokens: int  # sampled tokens, without the end-of-turn token
    finished: bool  # it ended by itself before the token limit


class Scorer(Protocol):
    """A reward for (prompt, completion); higher is better."""

    name: str  # prefix of its metrics: `gold` -> gold/reward, gold/win_rate

    def score(self, prompts: Sequence[str], completions: Sequence[Completion]) -> np.ndarray:
        """(N,) float64, finite."""
        ...


class SampleJudge(Protocol):
    """Compares the policy's completions with the reference's, on the prompts that trials sample."""

    name: str

    def outcomes(self, policy: Sequence[Completion], reference: Sequence[Completion]) -> np.ndarray:
        """(M,) 1 = the policy's completion is better, .5 tie, 0; NaN = no verdict."""
        ...
