"""Everyone against everyone on the same prompts: outcomes, win rates with intervals, Bradley-Terry strengths.

Pure but for asking the judge. A judge that compares is asked in both orders; a verdict that flips with the order is
a tie. Rows go to the judge prompt by prompt, so a cost cap leaves whole prompts judged, chosen by no outcome.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from prefopt_ray.errors import JudgeError, Problem
from prefopt_ray.judges.base import Advance, Judge, PairwiseJudge, Prompt, Tally, is_pointwise, silent
from prefopt_ray.measures.bradley_terry import Comparisons, Strengths, fit_strengths
from prefopt_ray.measures.proportions import wilson_interval
from prefopt_ray.train.scorers import Completion

REFERENCE_NAME = "reference"


@dataclass(frozen=True)
class Contest:
    """One competitor against another: prompts won, tied, lost, and those without a verdict."""

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    unjudged: int

    @property
    def judged(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def win_rate(self) -> float:
        """Ties count one half; .5 when nothing was judged."""
        return (self.wins + 0.5 * self.ties) / self.judged if self.judged else 0.5

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the win rate."""
        return wilson_interval(self.wins + 0.5 * self.ties, self.judged)


@dataclass(frozen=True)
class JudgedCompetitor:
    """A policy against the reference, and its Bradley-Terry strength above the reference in logits, 95 % intervals."""

    competitor: str
    win_rate: float
    win_low: float
    win_high: float
    judged: int  # prompts with a verdict against the reference
    strength: float
    strength_low: float | None  # None: not known (one prompt, or nothing but ties behind it)
    strength_high: float | None


@dataclass(frozen=True)
class Tournament:
    """Competitors from the strongest to the weakest, and every contest behind them."""

    judge: str
    prompts: int
    competitors: tuple[JudgedCompetitor, ...]
    contests: tuple[Contest, ...]
    flipped: int  # contests on one prompt whose verdict changed with the order; counted as ties
    tally: Tally

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Tournament":
        fields = dict(data)
        fields["competitors"] = tuple(JudgedCompetitor(**row) for row in fields["competitors"])
        fields["contests"] = tuple(Contest(**row) for row in fields["contests"])
        return cls(**{**fields, "tally": Tally(**fields["tally"])})


@dataclass(frozen=True)
class Outcomes:
    """(P, M) outcomes of P pairs of competitors on M prompts: 1 = the first won, .5 tie, 0, NaN = no verdict."""

    values: np.ndarray
    flipped: int
    tally: Tally


def play(
    judge: Judge, prompts: Sequence[Prompt], samples: Mapping[str, Sequence[Completion]], *, advance: Advance = silent
) -> Tournament:
    """Judge all competitors (the reference among them) on all prompts.

    `samples` holds one completion per prompt and competitor. Raises JudgeError, also when no prompt has a verdict.
    """
    names = sorted(samples, key=lambda name: name == REFERENCE_NAME)  # the reference last: it is the one met
    pairs = list(combinations(range(len(names)), 2))
    ordered = [samples[name] for name in names]
    decided = compare(judge, prompts, [(ordered[i], ordered[j]) for i, j in pairs], advance=advance)
    if np.isnan(decided.values).all():
        raise JudgeError(_no_verdict(judge, decided.tally))
    contests = tuple(_contest(names[i], names[j], row) for (i, j), row in zip(pairs, decided.values, strict=True))
    strengths = _strengths(names, pairs, decided.values)
    rows = [_competitor(names, place, contests, strengths=strengths) for place in range(len(names) - 1)]
    ranked = tuple(sorted(rows, key=lambda row: -row.strength))
    return Tournament(judge.name, len(prompts), ranked, contests, decided.flipped, decided.tally)


def compare(
    judge: Judge, prompts: Sequence[Prompt], pairs: Sequence[tuple[Sequence[Completion], Sequence[Completion]]],
    *, advance: Advance = silent,
) -> Outcomes:
    """Who wins on each prompt, for each pair of samples. A sample that stands in several pairs is scored once."""
    if not is_pointwise(judge):
        return _ask_both_orders(judge, prompts, pairs, advance=advance)
    distinct = {id(sample): sample for pair in pairs for sample in pair}
    flat = [completion for sample in distinct.values() for completion in sample]
    scores = judge.score(list(prompts) * len(distinct), flat, advance=advance).reshape(len(distinct), len(prompts))
    place = {key: row for row, key in enumerate(distinct)}
    gaps = np.array([scores[place[id(a)]] - scores[place[id(b)]] for a, b in pairs]).reshape(len(pairs), len(prompts))
    return Outcomes(0.5 + 0.5 * np.sign(gaps), 0, Tally())


def agreeing_pairs(first: Sequence[float], second: Sequence[float]) -> tuple[int, int]:
    """(pairs that two orders rank alike, pairs that both of them rank); equal values rank nothing."""
    signs = [
        (np.sign(first[i] - first[j]), np.sign(second[i] - second[j])) for i, j in combinations(range(len(first)), 2)
    ]
    ranked = [(a, b) for a, b in signs if a and b]
    return sum(bool(a == b) for a, b in ranked), len(ranked)


def _ask_both_orders(
    judge: PairwiseJudge, prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Sequence[Completion], Sequence[Completion]]], *, advance: Advance,
) -> Outcomes:
    asked, first, second = [], [], []
    for number, prompt in enumerate(prompts):
        for one, other in pairs:
            asked += [prompt, prompt]
            first += [one[number], other[number]]
            second += [other[number], one[number]]
    given = judge.prefer(asked, first, second, advance=advance)
    shares = given.shares.reshape(len(prompts), len(pairs), 2)  # (M, P, order)
    as_shown, swapped = np.sign(shares[..., 0] - 0.5), np.sign(0.5 - shares[..., 1])
    agreed = np.where(as_shown == swapped, as_shown, 0.0)
    values = np.where(np.isnan(as_shown + swapped), np.nan, 0.5 + 0.5 * agreed)
    return Outcomes(values.T, int((as_shown * swapped < 0).sum()), given.tally)


def _contest(first: str, second: str, outcomes: np.ndarray) -> Contest:
    wins, ties, losses = (int((outcomes == value).sum()) for value in (1.0, 0.5, 0.0))
    return Contest(first, second, wins, ties, losses, int(np.isnan(outcomes).sum()))


def _strengths(names: Sequence[str], pairs: Sequence[tuple[int, int]], outcomes: np.ndarray) -> Strengths:
    """With the usual weak prior: a competitor that won every time keeps a finite strength."""
    pair, prompt = np.nonzero(~np.isnan(outcomes))
    first, second = np.array(pairs).T
    return fit_strengths(Comparisons(
        tuple(names), first[pair], second[pair], outcomes[pair, prompt], clusters=prompt
    ))  # the same prompt's contests share completions, so they are no independent evidence


def _competitor(
    names: Sequence[str], place: int, contests: Sequence[Contest], *, strengths: Strengths
) -> JudgedCompetitor:
    met = next(c for c in contests if c.first == names[place] and c.second == REFERENCE_NAME)
    strength, *bounds = strengths.gap(place, len(names) - 1)
    low, high = bounds if _is_evidence(*bounds) else (None, None)
    return JudgedCompetitor(names[place], met.win_rate, *met.interval(), met.judged, strength, low, high)


def _is_evidence(low: float, high: float) -> bool:
    """Ties alone leave an interval of no width; they show a judge that cannot decide, not that two are equal."""
    return bool(np.isfinite(high - low)) and high - low > _NO_WIDTH


_NO_WIDTH = 1e-6  # logits; the fit stops at steps of 1e-10


def _no_verdict(judge: Judge, tally: Tally) -> Problem:
    counts = {key: value for key, value in asdict(replace(tally, usd=None, example="")).items() if value}
    found = ", ".join(f"{value} {key}" for key, value in counts.items()) or "nothing"
    shown = f"; the first answer was {tally.example!r}" if tally.example else ""
    return Problem(judge.name, "judge", found, f"not one prompt has a verdict in both orders{shown}",
                   "look at the endpoint's model and template, or raise the cap")
