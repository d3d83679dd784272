"""Verdicts against the truth: how often "this trial went wrong" is right, and how often nobody said so.

A verdict is judged on a history without the gold scores. Knows no figure and no file layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.gold_labels import Label, gold_label
from benchmarks.gold_trials import RecordedTrial

from prefopt_ray.measures.proportions import wilson_interval
from prefopt_ray.measures.verdicts import TrialHistory, judge
from prefopt_ray.thresholds import Thresholds
from prefopt_ray.trial import Verdict

POSITIVE = frozenset({"diverged", "broken", "memorised", "overfit", "collapsed_rejected"})


@dataclass(frozen=True)
class Judged:
    """A trial, what its gold reward did, and what its verdict at the end says."""

    trial: RecordedTrial
    label: Label
    verdict: Verdict

    @property
    def positive(self) -> bool:
        return self.verdict.headline in POSITIVE

    @property
    def kind(self) -> str:
        """right | false alarm | missed | not counted"""
        if self.label.fell is None:
            return "not counted"
        if self.label.fell == self.positive:
            return "right"
        return "false alarm" if self.positive else "missed"


@dataclass(frozen=True)
class Share:
    """A proportion with its 95 % Wilson interval."""

    hits: int
    of: int

    def __str__(self) -> str:
        low, high = wilson_interval(self.hits, self.of)
        share = f"{self.hits / self.of:.2f}" if self.of else "-"
        return f"{share} ({low:.2f} to {high:.2f}; {self.hits} of {self.of})"


def judged(trial: RecordedTrial, thresholds: Thresholds) -> Judged:
    """The verdict at the trial's end, gold unseen."""
    return Judged(trial, gold_label(trial), judge(without_scores(trial.history), thresholds))


def without_scores(history: TrialHistory) -> TrialHistory:
    """The history as of a trial whose samples nobody scored."""
    blind = [
        replace(record, samples=replace(record.samples, scores={})) if record.samples is not None else record
        for record in history.evaluations
    ]
    return replace(history, evaluations=blind)


def precision(found: Sequence[Judged]) -> Share:
    """Of the positive headlines, those whose gold reward did fall."""
    positives = [j for j in found if j.positive and j.label.fell is not None]
    return Share(sum(bool(j.label.fell) for j in positives), len(positives))


def recall(found: Sequence[Judged]) -> Share:
    """Of the trials whose gold reward fell, those with a positive headline."""
    fell = [j for j in found if j.label.fell]
    return Share(sum(j.positive for j in fell), len(fell))
