"""The answer of a sweep: the best configuration, where it stops, how sure that is, and what is as good.

Computed from the ledger and the stored per-pair files alone, so anyone can recompute it. Configurations are ranked
on the select part, by the mean over their seeds; the winner's number is quoted from the test part, on which nobody
selected. After a confirmation the answer is made of its runs only: their seeds selected nothing either.

What may be claimed follows from the seeds. With one seed each, errors are over pairs, and a difference is one of these
adapters: the best of several equal configurations trained once is a better adapter, by its seed. A difference of
configurations needs the spread between seeds, from `replicates` or `confirm`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prefopt_ray.results.configurations import Configuration, configurations
from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.results.ledger import CONFIRM, SweepRecord, TrialRecord, drift_per_token
from prefopt_ray.losses.cards import find_card
from prefopt_ray.measures.compare import (
    Difference,
    GainInterval,
    SeedSpread,
    gain_interval,
    indistinguishable,
    losses_by_seed,
    pooled_spread,
    seeds_difference,
    seeds_interval,
)
from prefopt_ray.measures.metrics import margins
from prefopt_ray.train.evaluations import EvaluationLog

EVALUATIONS_FILE, TEST_FILE = "evaluations.safetensors", "test.safetensors"
MAX_FINALISTS = 16  # configurations scored on the test part, baseline not counted
# Two looks, at select to find the finalists and at test: 2.5 % each keeps the whole within 5 %.
LOOK_CONFIDENCE = 0.975
# A difference of (z(.975) + z(.8)) standard errors is seen four times in five.
RESOLVED_ERRORS = 2.8

# (trial, part, step) -> (N,) implicit margins and the groups that cluster their errors
MarginsReader = Callable[[TrialRecord, str, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Standing:
    """One configuration in the order of the answer."""

    rank: int  # from 1
    configuration: Configuration
    drift: float  # mean |log-ratio| per token at the best step, select part, nats; inf when never evaluated

    @property
    def trial(self) -> TrialRecord:
        """The first seed's."""
        return self.configuration.first


@dataclass(frozen=True)
class Alike:
    """A configuration that is not shown to be worse than the winner: gain(winner) - gain(it), bits per pair."""

    configuration: Configuration
    difference: Difference
    part: str  # test, or select where it was not scored on test

    @property
    def trial(self) -> TrialRecord:
        return self.configuration.first

    @property
    def better(self) -> bool:
        """It did better than the winner on pairs that did not choose the winner."""
        return self.difference.high < 0


@dataclass(frozen=True)
class Answer:
    """None of the optional fields is there before the finalists are scored on the test part."""

    standings: tuple[Standing, ...]  # of the search
    winner: Configuration | None  # None: no configuration has a valid score; of the confirmation, where there was one
    baseline: Configuration | None
    confirmed: tuple[Configuration, ...] = ()  # best first; those whose runs did not reach their length come last
    test_gain: GainInterval | None = None
    baseline_gain: GainInterval | None = None
    over_baseline: Difference | None = None  # winner - baseline on test; None when the winner is the baseline
    of_configurations: bool = False  # the numbers above hold for configurations, not only for these adapters
    alike: tuple[Alike, ...] = ()
    resolvable: float | None = None  # a difference these pairs would show four times in five, bits per pair
    warnings: tuple[str, ...] = ()

    @property
    def beats_baseline(self) -> bool:
        """The configuration is better than the baseline, beyond pairs and seeds."""
        return self.of_configurations and self.adapter_beats_baseline

    @property
    def adapter_beats_baseline(self) -> bool:
        """The adapters at hand are better than the baseline's."""
        return self.over_baseline is not None and self.over_baseline.low > 0

    @property
    def order_changed(self) -> bool:
        """The confirmation orders its configurations otherwise than the search did."""
        order = [self.rank_of(configuration) for configuration in self.confirmed]
        return order != sorted(order)

    def rank_of(self, configuration: Configuration) -> int:
        """In the search, also of a confirmation."""
        return next(s.rank for s in self.standings if s.configuration.key == configuration.key)


def find_answer(sweep: SweepRecord, *, read: MarginsReader | None = None) -> Answer:
    """The answer as far as the sweep has come. `read` gives margins, by default from the sweep's folder.

    Raises SweepError for a loss that is not known here.
    """
    require_known_losses(sweep)
    evidence = _Evidence(sweep, read or _stored_margins(sweep))
    standings = ranking(sweep)
    searched = [s.configuration for s in standings]
    confirmed = confirmation(sweep) if any(evidence.is_tested(c) for c in confirmation(sweep)) else ()
    field = list(confirmed) or searched
    winner = next((c for c in field if c.score >= 0), None)
    baseline = next((c for c in field if c.baseline), None)
    warnings = _warnings(sweep, standings, winner) if winner else ()
    answer = Answer(standings, winner, baseline, confirmed, warnings=warnings)
    return _tested(answer, evidence) if winner and evidence.is_tested(winner) else answer


def ranking(sweep: SweepRecord) -> tuple[Standing, ...]:
    """The searched configurations by score, then lower drift at the best step, then trial id.

    One that has fewer seeds than others (stopped or broken before the further ones) stands behind those, whatever its
    one seed scored: a single seed's luck is larger than a mean's.
    """
    searched = configurations(sweep)
    most = max((len(c.seeds) for c in searched if c.score >= 0), default=1)

    def place(configuration: Configuration) -> tuple[bool, bool, float, float, str]:
        score = configuration.score
        return score < 0, len(configuration.seeds) < most, -score, _drift(configuration), configuration.key

    order = sorted(searched, key=place)
    return tuple(Standing(rank, c, _drift(c)) for rank, c in enumerate(order, start=1))


def confirmation(sweep: SweepRecord) -> tuple[Configuration, ...]:
    """The confirmed configurations, best first by their runs' mean gain on the select part."""
    runs = configurations(sweep, role=CONFIRM)
    return tuple(sorted(runs, key=lambda c: (-c.score, _drift(c), c.key)))


def to_confirm(sweep: SweepRecord, *, top: int) -> list[Configuration]:
    """Whom to train again: the first `top` with a valid score beside the baseline, and the baseline.

    Beside it, since a baseline that ranks first would otherwise be compared with nobody.
    """
    valid = _valid(sweep)
    rivals = [c for c in valid if not c.baseline][:top]
    return [c for c in valid if c.baseline or c in rivals]


def in_question(sweep: SweepRecord, *, top: int, also_searched: bool = False) -> list[Configuration]:
    """What the answer is about, in its order: the confirmed configurations, else the first `top` and the baseline.

    `also_searched`: behind the confirmed ones, the first `top` as the search trained them.
    """
    confirmed = [c for c in confirmation(sweep) if c.score >= 0]
    if confirmed and also_searched:
        return confirmed + _valid(sweep)[:top]
    return confirmed or to_confirm(sweep, top=top)


def finalists(sweep: SweepRecord) -> list[TrialRecord]:
    """Whom to score on the test part, each at its configuration's stop step.

    After a confirmation its valid runs; else all seeds of the winner, of the next in rank, of those that the select
    part cannot tell from the winner, and of the baseline.
    """
    confirmed = [c for c in confirmation(sweep) if c.score >= 0]
    if confirmed:
        return [trial for c in confirmed for trial in c.seeds]
    valid = _valid(sweep)
    if not valid:
        return []
    alike = _Evidence(sweep, _stored_margins(sweep)).indistinguishable(valid[0], valid[1:], part="select")
    # The next in rank in any case: that it is worse should not rest on the pairs that ranked it.
    chosen = [*valid[:2], *(c for c in valid[2:] if c.key in alike)][:MAX_FINALISTS]
    chosen += [c for c in valid if c.baseline and c not in chosen]
    return [trial for c in chosen for trial in c.seeds]


def test_gains(sweep: SweepRecord) -> dict[str, GainInterval]:
    """Each adapter's own gain on test, by trial, where it was scored there: what a table can be sorted by."""
    read = _stored_margins(sweep)
    return {
        trial_id: gain_interval(*read(sweep.trials[trial_id], "test", step)) for trial_id, step in sweep.tested.items()
    }


def trial_folder(sweep: SweepRecord, trial: TrialRecord) -> Path:
    return sweep.folder / "trials" / trial.trial_id


def require_known_losses(sweep: SweepRecord) -> None:
    """Raises SweepError when a trial's loss was registered by the program that ran the sweep, and not by this one."""
    losses = dict.fromkeys(trial.config.loss for trial in sweep.trials.values())
    unknown = [loss for loss in losses if not _is_known(loss)]
    if unknown:
        raise SweepError(*(
            Problem(
                str(sweep.folder), "loss", repr(loss),
                "this sweep trained a loss that is not registered here, and its numbers cannot be read without it",
                "install the package that provides it as an entry point `prefopt_ray.losses`, or call "
                "register_loss(...) before reading the sweep in Python (docs/guides/your-own-loss.md)",
            ) for loss in unknown
        ))


def _is_known(loss: str) -> bool:
    try:
        find_card(loss)
    except KeyError:
        return False
    return True


def _tested(answer: Answer, evidence: "_Evidence") -> Answer:
    """The answer with what the test part says. The baseline is one comparison, planned beforehand; the others share
    the risk of being many."""
    winner, baseline = answer.winner, answer.baseline
    field = list(answer.confirmed) or [s.configuration for s in answer.standings]
    others = [c for c in field if c.score >= 0 and c.key not in (winner.key, baseline.key if baseline else "")]
    candidates = max(1, len(others) + (not winner.baseline))  # the winner was the best of so many, by these seeds
    spread = evidence.spread([c for c in field if evidence.is_tested(c)], part="test")
    baseline_gain, over = None, None
    if baseline is not None and evidence.is_tested(baseline):
        baseline_gain = evidence.gain(baseline, spread, candidates=1)
        if baseline is not winner:
            over = evidence.difference(winner, baseline, spread, candidates=candidates)
    alike = _alike(answer, evidence, others)
    if over is not None and not over.low > 0:
        alike = (Alike(baseline, over, "test"), *alike)
    errors = [evidence.difference(winner, c, spread, candidates=1).se for c in others if evidence.is_tested(c)]
    errors = [error for error in errors if np.isfinite(error)]
    return replace(
        answer, test_gain=evidence.gain(winner, spread, candidates=candidates), baseline_gain=baseline_gain,
        over_baseline=over, of_configurations=spread is not None, alike=alike,
        resolvable=RESOLVED_ERRORS * float(np.median(errors)) if errors else None,
    )


def _alike(answer: Answer, evidence: "_Evidence", others: list[Configuration]) -> tuple[Alike, ...]:
    """Those on test; and on select, as the search trained them, those that were not scored on test."""
    tested = [c for c in others if evidence.is_tested(c)]
    on_test = evidence.indistinguishable(answer.winner, tested, part="test")
    compared = {c.key for c in (answer.winner, answer.baseline, *tested) if c is not None}
    searched = [s.configuration for s in answer.standings]
    untested = [c for c in searched if c.score >= 0 and c.key not in compared]
    first = next(c for c in searched if c.key == answer.winner.key)
    on_select = evidence.indistinguishable(first, untested, part="select")
    return tuple(
        Alike(c, found[c.key], part)
        for group, found, part in ((tested, on_test, "test"), (untested, on_select, "select"))
        for c in group if c.key in found
    )


class _Evidence:
    """The stored margins of configurations, by seed, and what they say against each other."""

    def __init__(self, sweep: SweepRecord, read: MarginsReader) -> None:
        self._sweep, self._read = sweep, read
        self._known: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    def is_tested(self, configuration: Configuration) -> bool:
        return any(trial.trial_id in self._sweep.tested for trial in configuration.seeds)

    def spread(self, among: Iterable[Configuration], *, part: str) -> SeedSpread | None:
        """Between the seeds of configurations like these; None where each has one."""
        return pooled_spread([self._losses(c, part) for c in among if len(c.seeds) > 1])

    def gain(self, configuration: Configuration, spread: SeedSpread | None, *, candidates: int) -> GainInterval:
        losses, groups = self._losses(configuration, "test"), self._groups(configuration, "test")
        return seeds_interval(losses, groups, spread=spread, candidates=candidates)

    def difference(
        self, first: Configuration, second: Configuration, spread: SeedSpread | None, *, candidates: int
    ) -> Difference:
        return seeds_difference(
            self._losses(first, "test"), self._losses(second, "test"), self._groups(first, "test"), spread=spread,
            candidates=candidates,
        )

    def indistinguishable(
        self, winner: Configuration, others: list[Configuration], *, part: str
    ) -> dict[str, Difference]:
        """By configuration."""
        if not others:
            return {}
        return indistinguishable(
            self._losses(winner, part), {c.key: self._losses(c, part) for c in others}, self._groups(winner, part),
            spread=self.spread([winner, *others], part=part), confidence=LOOK_CONFIDENCE,
        )

    def _losses(self, configuration: Configuration, part: str) -> np.ndarray:
        return self._stored(configuration, part)[0]

    def _groups(self, configuration: Configuration, part: str) -> np.ndarray:
        return self._stored(configuration, part)[1]

    def _stored(self, configuration: Configuration, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Losses (K, N) in bits, and the groups (N,); read once."""
        key = (configuration.trial_id, part)
        if key not in self._known:
            read = [self._read(*place) for place in self._places(configuration, part)]
            self._known[key] = losses_by_seed([margins for margins, _ in read]), read[0][1]
        return self._known[key]

    def _places(self, configuration: Configuration, part: str) -> list[tuple[TrialRecord, str, int]]:
        """What to read of each seed; on test, of each that could be scored."""
        if part != "test":
            return [(trial, part, configuration.best_step) for trial in configuration.seeds]
        tested = self._sweep.tested
        return [(t, part, tested[t.trial_id]) for t in configuration.seeds if t.trial_id in tested]


def _stored_margins(sweep: SweepRecord) -> MarginsReader:
    def read(trial: TrialRecord, part: str, step: int) -> tuple[np.ndarray, np.ndarray]:
        file = TEST_FILE if part == "test" else EVALUATIONS_FILE
        stored = EvaluationLog.load(trial_folder(sweep, trial) / file)
        return margins(stored.stats(part, step), find_card(trial.config.loss)), stored.groups(part)

    return read


def _valid(sweep: SweepRecord) -> list[Configuration]:
    return [s.configuration for s in ranking(sweep) if s.configuration.score >= 0]


def _drift(configuration: Configuration) -> float:
    step = configuration.best_step
    if step < 0:
        return float("inf")
    return float(np.mean([drift_per_token(trial.reports[step].metrics) for trial in configuration.seeds]))


def _gain_before_training(configuration: Configuration) -> float | None:
    """Where the loss's reward is not the log-ratio to the start: its gain at step 0, if that is beyond chance."""
    start = configuration.first.reports.get(0)
    if start is None or "eval/gain" not in start.metrics:
        return None
    gain, se = start.metrics["eval/gain"], start.metrics["eval/gain_se"]
    return gain if gain > 2 * se and gain > 0 else None


def _warnings(sweep: SweepRecord, standings: tuple[Standing, ...], winner: Configuration) -> tuple[str, ...]:
    out = []
    first = next(s.configuration for s in standings if s.configuration.score >= 0)
    valid = [s.configuration for s in standings if s.configuration.score >= 0]
    for key, name in (("eval/gain_sum", "summed log-ratios"), ("eval/gain_per_token", "per-token log-ratios")):
        best = max(valid, key=lambda c: _mean_metric(c, key))
        if best is not first and best.config.loss != first.config.loss:
            out.append(f"judged by {name}, trial {best.trial_id} ({best.config.label}) would be first")
    if any("drift_limit" in t.reports[winner.best_step].verdict.flags for t in winner.seeds):
        out.append("the best trial is beyond the drift limit at its best step; look at what it writes before using it")
    untrained = _gain_before_training(winner)
    if untrained is not None:
        out.append(f"its reward already had a gain of {untrained:.4f} before any training, which the gain above includes; "
                   "a loss that reads no reference starts with what the model's own likelihood says")
    for trial_id, reason in sweep.untested.items():
        out.append(f"trial {trial_id} could not be scored on test: {reason}")
    if winner.first.unopposed:
        out.append("the best trial passed a rung before any other trial was there")
    for configuration in (*valid, *confirmation(sweep)):
        missing = [t for t in configuration.trials if t not in configuration.seeds]
        out += [f"trial {t.trial_id} (seed {t.seed}) {t.state} and is left out of its configuration's mean"
                for t in missing]
    return tuple(out)


def _mean_metric(configuration: Configuration, key: str) -> float:
    step = configuration.best_step
    return float(np.mean([trial.reports[step].metrics[key] for trial in configuration.seeds]))
