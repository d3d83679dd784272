"""Loss cards: what each loss is, needs, promises and how it is usually searched. Plain data, no torch.

Adding a loss is one card here, one function in `formulas` and one line in the contract suite.
Ranges: "The differences between direct alignment algorithms are a blur" (arXiv:2502.01237), the
papers named on each card, and TRL's published recipes; LoRA learns at about ten times the rate of
full fine-tuning.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LN2 = math.log(2.0)


@dataclass(frozen=True)
class Range:
    """A usual search range; `log` = drawn uniformly in the logarithm."""

    low: float
    high: float
    log: bool = True


@dataclass(frozen=True)
class Param:
    """One number a loss reads. `lower < value < upper`, or `<=` where the bound is inclusive."""

    name: str
    default: float
    usual: Range
    meaning: str
    lower: float = 0.0
    upper: float = math.inf
    lower_inclusive: bool = False
    upper_inclusive: bool = False
    searched: bool = True  # `{}` in a spec searches `usual`; otherwise the default is used

    def allows(self, value: float) -> bool:
        above = value >= self.lower if self.lower_inclusive else value > self.lower
        below = value <= self.upper if self.upper_inclusive else value < self.upper
        return math.isfinite(value) and above and below

    @property
    def rule(self) -> str:
        low = f"{self.name} must be {'>=' if self.lower_inclusive else '>'} {self.lower:g}"
        if math.isinf(self.upper):
            return low
        return f"{low} and {'<=' if self.upper_inclusive else '<'} {self.upper:g}"


@dataclass(frozen=True)
class LossCard:
    """What the rest of the program may know about a loss without computing it."""

    name: str
    title: str
    formula: str  # per pair; h = Dc - Dr, u = beta h, D = summed log-ratio to the reference
    source: str
    params: tuple[Param, ...]
    needs: frozenset[str]  # of {"reference", "lengths", "per_token", "token_sq", "distribution", "mismatched", "scores"}
    reward: str  # its implicit reward: "sum" (h) | "per_token" (Dc/|yc| - Dr/|yr|) | "policy_per_token"
    beta_unit: str
    loss_at_start: Callable[[Mapping[str, float]], float] | None  # L0, policy == reference; None = measured at step 0
    learning_rate_lora: Range
    learning_rate_full: Range
    bradley_terry: bool  # -log sigma of the scaled reward: calibration is meaningful
    bounded_below: bool = True
    scope: str = "pair"  # pair | batch
    stateful: bool = False
    aliases: tuple[str, ...] = ()
    note: str = ""

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    @property
    def param_names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.params)

    def learning_rate(self, adapter_kind: str) -> Range:
        return self.learning_rate_full if adapter_kind == "none" else self.learning_rate_lora


def _beta(default: float, low: float, high: float, meaning: str) -> Param:
    return Param("beta", default, Range(low, high), meaning)


def _smoothing(default: float, meaning: str) -> Param:
    return Param(
        "label_smoothing", default, Range(0.05, 0.3, log=False), meaning,
        lower=0.0, upper=0.5, lower_inclusive=True, searched=False,
    )


def _ipo_start(params: Mapping[str, float]) -> float:
    return 1.0 / (4.0 * params["beta"] ** 2)


def _ln2(params: Mapping[str, float]) -> float:
    return LN2


def _one(params: Mapping[str, float]) -> float:
    return 1.0


_REFERENCE = frozenset({"reference"})
_RATES = {"learning_rate_lora": Range(3e-6, 5e-5), "learning_rate_full": Range(3e-7, 3e-6)}
_PER_NAT = "1 / nat of summed log-ratio"

CARDS: dict[str, LossCard] = {
    card.name: card
    for card in (
        LossCard(
            name="sigmoid", title="DPO", formula="-log sigma(u)",
            source="Rafailov et al. 2023, arXiv:2305.18290, Eq. 7",
            params=(_beta(0.1, 3e-3, 0.5, "strength of the KL anchor; at a finite budget smaller drifts further"),),
            needs=_REFERENCE, reward="sum", beta_unit=_PER_NAT, loss_at_start=_ln2,
            bradley_terry=True, aliases=("dpo",), **_RATES,
            note="With deterministic preferences no minimiser exists: h grows without bound, whatever beta.",
        ),
        LossCard(
            name="cdpo", title="conservative DPO", formula="-(1-e) log sigma(u) - e log sigma(-u)",
            source="Mitchell 2023, 'A note on DPO with noisy preferences'",
            params=(_beta(0.1, 3e-3, 0.5, "as in sigmoid"),
                    _smoothing(0.1, "assumed share of flipped labels; stops at u = logit(1-e)")),
            needs=_REFERENCE, reward="sum", beta_unit=_PER_NAT, loss_at_start=_ln2,
            bradley_terry=True, **_RATES,
            note="TRL 1.16's `sigmoid` ignores label_smoothing; this is the loss it used to be.",
        ),
        LossCard(
            name="ipo_mean", title="IPO, length-averaged", formula="(Dc/|yc| - Dr/|yr| - 1/(2 beta))^2",
            source="Azar et al. 2023, arXiv:2310.12036, Eq. 17, with log-ratios averaged over tokens as in TRL",
            params=(_beta(0.5, 0.1, 10.0, "target margin is 1/(2 beta) nats per token"),),
            needs=frozenset({"reference", "lengths"}), reward="per_token",
            beta_unit="1 / (nat per token)", loss_at_start=_ipo_start, bradley_terry=False,
            aliases=("ipo",), **_RATES,
            note="The same beta means another thing than in ipo_sum: 0.1 aims at 5 nats per token, no anchor at all.",
        ),
        LossCard(
            name="ipo_sum", title="IPO, summed (the paper's)", formula="(h - 1/(2 beta))^2",
            source="Azar et al. 2023, arXiv:2310.12036, Eq. 17 (beta is the paper's tau)",
            params=(_beta(0.01, 7e-4, 0.1, "target margin is 1/(2 beta) nats; training stops there"),),
            needs=_REFERENCE, reward="sum", beta_unit=_PER_NAT, loss_at_start=_ipo_start,
            bradley_terry=False, **_RATES,
            note="Under SGD its first gradient is 2/beta^2 times DPO's: it blows up at learning rates DPO survives.",
        ),
        LossCard(
            name="hinge", title="hinge (RSO)", formula="max(0, 1 - u)",
            source="Liu et al. 2023, arXiv:2309.06657; Zhao et al. 2023, arXiv:2305.10425",
            params=(_beta(0.05, 0.01, 0.5, "margin reached at h = 1/beta"),),
            needs=_REFERENCE, reward="sum", beta_unit=_PER_NAT, loss_at_start=_one, bradley_terry=False,
            learning_rate_lora=Range(3e-6, 2e-5), learning_rate_full=Range(3e-7, 2e-6),
        ),
        LossCard(
            name="robust", title="robust DPO", formula="[-(1-e) log sigma(u) + e log sigma(-u)] / (1-2e)",
            source="Chowdhury et al. 2024, arXiv:2403.00409",
            params=(_beta(0.1, 3e-3, 0.5, "as in sigmoid"),
                    _smoothing(0.1, "assumed share of flipped labels, subtracted out")),
            needs=_REFERENCE, reward="sum", beta_unit=_PER_NAT, loss_at_start=_ln2,
            bradley_terry=True, bounded_below=False, **_RATES,
            note="Unbounded below when labels are cleaner than e: the loss then runs to minus infinity.",
        ),
        LossCard(
            name="simpo", title="SimPO", formula="-log sigma(beta (log pi_c/|yc| - log pi_r/|yr|) - gamma_ratio beta)",
            source="Meng et al. 2024, arXiv:2405.14734, Eq. 6 (gamma = gamma_ratio x beta)",
            params=(_beta(2.0, 1.0, 20.0, "scale of the length-normalised policy margin"),
                    Param("gamma_ratio", 0.5, Range(0.0, 1.0, log=False), "target margin / beta, nats per token",
                          lower=0.0, lower_inclusive=True)),
            needs=frozenset({"lengths"}), reward="policy_per_token", beta_unit="1 / (nat per token)",
            loss_at_start=None, bradley_terry=True,
            learning_rate_lora=Range(3e-6, 1e-5), learning_rate_full=Range(3e-7, 1e-6),
            note="Reference-free: nothing in the loss anchors the policy; drift is still measured and shown.",
        ),
    )
}

_ALIASES = {alias: card.name for card in CARDS.values() for alias in card.aliases}
LOSS_NAMES: tuple[str, ...] = tuple(CARDS)


def find_card(name: str) -> LossCard:
    """The card of a full name or alias (`ipo` -> `ipo_mean`, `dpo` -> `sigmoid`); KeyError otherwise."""
    return CARDS[_ALIASES.get(name, name)]


def closest_loss(name: str) -> str | None:
    """For "did you mean"."""
    matches = difflib.get_close_matches(name, [*CARDS, *_ALIASES], n=1)
    return matches[0] if matches else None
