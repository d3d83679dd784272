"""Epochs, pairs, percentages and rungs -> optimizer steps. Pure arithmetic.

Every percentage is of the schedule's full length, also where `stop_step` ends training before it.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from prefopt_ray.spec.sections import DEFAULT_PRESET, PRESETS, RUNGS, Preset, SchedulerSpec, TrainingSpec

# Where trials are evaluated at `eval.at: auto`: quarters for the course, rungs for the decisions, 1 % for early damage.
OPTIONAL_EVALUATIONS = ("25%", "50%", "75%")
AUTO_EVALUATIONS = (0, "1%", RUNGS, *OPTIONAL_EVALUATIONS)


def full_length(training: TrainingSpec, train_pairs: int) -> int:
    """Steps of the whole schedule; a last batch that is not full counts."""
    if training.steps is not None:
        return training.steps
    pairs = training.pairs if training.pairs is not None else Fraction(str(training.epochs)) * train_pairs
    return max(1, math.ceil(Fraction(pairs) / training.batch_pairs))


def amount_in_steps(amount: int | str, length: int) -> int:
    """`3%` of `length`, rounded to the nearest step, or the steps themselves."""
    if isinstance(amount, int):
        return amount
    return _nearest(_share(amount) * length)


def rung_steps(scheduler: SchedulerSpec, total: int, last: int) -> tuple[int, ...]:
    """Where the scheduler decides: the first rung, then times `keep_one_in`, below the last trained step.

    Each rung is rounded by itself: 11 x 3 x 3 would put a rung at step 99 of 100.
    """
    factor = scheduler.factor
    exact = _first_rung(scheduler, PRESETS[scheduler.preset or DEFAULT_PRESET], total)
    steps = set()
    while exact < last:
        steps.add(max(1, _nearest(exact)))
        exact *= factor
    return tuple(sorted(step for step in steps if step < last))


def evaluation_steps(at: Iterable[int | str], rungs: tuple[int, ...], total: int, last: int) -> tuple[int, ...]:
    """`at`, and what every trial has: 0, about 1 % (damage before the first rung shows there) and the end."""
    always = {0, min(last, max(1, amount_in_steps("1%", total))), last}
    return tuple(sorted(always | _positions(at, rungs, total=total, last=last)))


def middle_first(steps: Sequence[int]) -> list[int]:
    """In the order they are missed most: the middle one first, then the middles of both sides."""
    if not steps:
        return []
    middle = len(steps) // 2
    return [steps[middle], *middle_first(steps[:middle]), *middle_first(steps[middle + 1 :])]


def sample_steps(at: Iterable[int | str], rungs: tuple[int, ...], total: int, last: int) -> tuple[int, ...]:
    """The steps asked for; `rungs` includes the last step, where the trials that nobody stopped end."""
    at = tuple(at)
    end = {last} if RUNGS in at else set()
    return tuple(sorted(_positions(at, rungs, total=total, last=last) | end))


def _first_rung(scheduler: SchedulerSpec, preset: Preset, total: int) -> Fraction:
    if scheduler.first_rung is None:
        return preset.first_rung * total
    if isinstance(scheduler.first_rung, int):
        return Fraction(scheduler.first_rung)
    return _share(scheduler.first_rung) * total


def _share(percent: str) -> Fraction:
    return Fraction(percent.rstrip("%")) / 100


def _positions(at: Iterable[int | str], rungs: tuple[int, ...], *, total: int, last: int) -> set[int]:
    """Steps beyond the last are dropped: a shorter training asks for fewer evaluations."""
    steps: set[int] = set()
    for position in at:
        steps |= set(rungs) if position == RUNGS else {amount_in_steps(position, total)}
    return {step for step in steps if step <= last}


def _nearest(steps: Fraction) -> int:
    return math.floor(steps + Fraction(1, 2))
