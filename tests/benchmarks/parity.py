"""Whether two runs computed the same: before that is known, no time means anything."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Largest relative differences at any step."""

    loss: float
    grad_norm: float


# Another order of adding, eight steps apart: what our tests hold every engine to.
FLOAT32 = Limits(loss=1e-5, grad_norm=1e-4)


def float32_limits(logp_nats: float, *, beta: float) -> Limits:
    """FLOAT32, or what float32 can tell apart: a completion's summed log-prob of thousands of nats is itself only
    known to its last bit, and that bit times beta is in a loss of ln 2."""
    last_bit = 2.0 ** (math.floor(math.log2(logp_nats)) - 23)
    return Limits(max(FLOAT32.loss, beta * last_bit / math.log(2)), FLOAT32.grad_norm)


@dataclass(frozen=True)
class Difference:
    """The largest relative differences that were found."""

    loss: float
    grad_norm: float

    def within(self, limits: Limits) -> bool:
        return self.loss <= limits.loss and self.grad_norm <= limits.grad_norm

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, gradient norm {self.grad_norm:.1e}"


def largest_relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """max |ours - theirs| / |theirs|. Infinite for runs of different or no length, and where a value is not finite."""
    if not ours or len(ours) != len(theirs):
        return float("inf")
    gaps = [abs(a - b) / abs(b) if b else float(a != b) for a, b in zip(ours, theirs, strict=True)]
    return max(float("inf") if math.isnan(gap) else gap for gap in gaps)
