"""The truth about a recorded trial: did the gold reward of its samples fall from its peak, and how sure is that?

The peak step is chosen on half of the prompts and the drop measured on the other half, so that the highest of many
noisy means does not make a drop by itself. Knows no verdict.
"""

from dataclasses import dataclass

import numpy as np
from benchmarks.gold_trials import RecordedTrial

from prefopt_ray.measures.clustered import clustered_mean

FELL_ERRORS, KEPT_ERRORS = 2.0, 1.0  # paired standard errors; drops between the two are not counted


@dataclass(frozen=True)
class Label:
    """`fell` is None where the drop is between one and two of its standard errors."""

    peak_step: int
    drop: float  # gold reward at the peak - at the last evaluation, on the half that did not choose the peak
    se: float
    fell: bool | None


def gold_label(trial: RecordedTrial) -> Label:
    """Of a trial that drew samples."""
    steps = sorted(trial.gold)
    choose = np.random.default_rng(0).permutation(len(trial.gold[steps[0]])) % 2 == 0  # the same half for everybody
    peak = max(steps, key=lambda step: trial.gold[step][choose].mean())
    difference = clustered_mean((trial.gold[peak] - trial.gold[steps[-1]])[~choose], None)
    errors = difference.mean / difference.se if difference.se > 0 else 0.0  # the peak is the end: no drop
    fell = True if errors > FELL_ERRORS else False if errors <= KEPT_ERRORS else None
    return Label(peak, difference.mean, difference.se, fell)
