"""What several cards share: parameters, starting values, learning rates. Plain data, no torch.

Ranges: "The differences between direct alignment algorithms are a blur" (arXiv:2502.01237), the papers
named on each card, and TRL's published recipes; LoRA learns at about ten times the rate of full fine-tuning.
"""

import math
from collections.abc import Mapping

from prefopt_ray.losses.card import Param, Range

LN2 = math.log(2.0)

REFERENCE = frozenset({"reference"})
REFERENCE_AND_LENGTHS = frozenset({"reference", "lengths"})
PER_NAT = "1 / nat of summed log-ratio"
PER_NAT_PER_TOKEN = "1 / (nat per token)"
NO_BETA = "none: this loss has no beta, rewards are shown unscaled"

# The largest exponent taken of a log-ratio: e^30 squared, over a small beta, still fits in float32.
EXPONENT_LIMIT = 30.0


def rates(full_low: float, full_high: float, *, lora_high: float | None = None) -> dict[str, Range]:
    """Usual learning rates for full fine-tuning and, at ten times that, for a LoRA."""
    return {
        "learning_rate_full": Range(full_low, full_high),
        "learning_rate_lora": Range(10 * full_low, lora_high or 10 * full_high),
    }


DPO_RATES = rates(3e-7, 3e-6, lora_high=5e-5)


def beta(default: float, low: float, high: float, *, meaning: str) -> Param:
    return Param("beta", default, Range(low, high), meaning)


def smoothing(default: float, *, meaning: str) -> Param:
    return Param(
        "label_smoothing", default, Range(0.05, 0.3, log=False), meaning,
        lower=0.0, upper=0.5, lower_inclusive=True, searched=False,
    )  # fmt: skip


def fixed(name: str, default: float, usual: Range, *, meaning: str, **bounds: float | bool) -> Param:
    """A parameter that keeps its published default unless a spec names it."""
    return Param(name, default, usual, meaning, searched=False, **bounds)


def ln2(params: Mapping[str, float]) -> float:
    return LN2


def two_ln2(params: Mapping[str, float]) -> float:
    return 2 * LN2


def one(params: Mapping[str, float]) -> float:
    return 1.0
