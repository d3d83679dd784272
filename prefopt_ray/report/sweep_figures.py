"""Figures of a whole sweep: one question each, drawn from what its trials stored.

Knows ledgers, per-pair evaluations and matplotlib; not how trials are run or where a figure is kept.
"""

from collections.abc import Callable, Iterator

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.report.trial_figure import BLUE, GREY, ORANGE, STYLE
from prefopt_ray.results.ledger import SweepRecord, TrialRecord
from prefopt_ray.spec import load_spec
from prefopt_ray.spec.sections import BANDIT
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.trial import EndState

PANEL_INCHES = (5.0, 4.0)
SHOWN_FALL = 2.0  # gold reward below the reference's own
_COLOURS = "viridis"
STEP = "step"  # on the x axis in place of a metric
_Points = list[tuple[float, float]]


def draw(sweep: SweepRecord, kind: str) -> Figure:
    """The figure `kind` (a key of FIGURES) of a sweep. Raises SweepError when it stored nothing to draw."""
    with mpl.rc_context(STYLE):
        figure = FIGURES[kind](sweep)
        for axes in figure.axes:
            if axes.lines:
                axes.legend(frameon=False, loc="best", fontsize=8)
    if not any(axes.lines for axes in figure.axes):
        rule = f"no trial measured what the figure {kind} shows"
        raise SweepError(Problem(str(sweep.folder), "", "", rule, f"the figures are {', '.join(FIGURES)}"))
    return figure


def frontier(sweep: SweepRecord) -> Figure:
    """Gold reward against KL to the reference, on an axis of its root: the hump of over-optimisation."""
    figure = _gold_against(sweep, "samples/kl", xlabel="KL to the reference, nats per completion")
    for axes in figure.axes:
        axes.set_xscale("function", functions=(_root, np.square))
        axes.set_xlim(left=0)
    return figure


def gold(sweep: SweepRecord) -> Figure:
    """Gold reward against the optimizer step."""
    return _gold_against(sweep, STEP, xlabel="optimizer step")


def paths(sweep: SweepRecord) -> Figure:
    """The margin h of the pairs trained on against the step, one curve per trial; dashed: where IPO wants it."""
    figure, panels = _panels_by_loss(sweep, xlabel="optimizer step", ylabel="h of the pairs trained on, nats")
    for axes, trials in panels:
        axes.set_xscale("symlog", linthresh=10)
        for trial, colour in _coloured(trials):
            points = _reported(trial, STEP, "probe/h/mean")
            _draw_curve(axes, points, colour, label=_values_label(trial))
            if points and trial.config.loss == "ipo_sum":
                axes.axhline(1 / (2 * trial.config.loss_params["beta"]), color=colour, linestyle="--", linewidth=1)
    return figure


def learning_rates(sweep: SweepRecord) -> Figure:
    """The last gain against the learning rate; rings are trials that ended early, crosses those that diverged."""
    figure, panels = _panels_by_loss(sweep, xlabel="learning rate", ylabel="gain on select at the end, bits per pair")
    for axes, trials in panels:
        axes.set_xscale("log")
        whole = [trial for trial in trials if trial.end_state is EndState.COMPLETED]
        _draw_curve(axes, _last_gains(whole), BLUE, label="reached the end")
        ended = [trial for trial in trials if trial.end_state not in (EndState.COMPLETED, EndState.DIVERGED, None)]
        stopped = _last_gains([trial for trial in ended if trial.score >= 0])
        if stopped:
            axes.plot(*zip(*stopped), "o", color=GREY, fillstyle="none", label="stopped")
        broken = [(t.config.learning_rate, 0.0) for t in trials if t.end_state is EndState.DIVERGED]
        if broken:
            axes.plot(*zip(*broken), "x", color=ORANGE, label="diverged")
    return figure


def bandit(sweep: SweepRecord) -> Figure:
    """The best action's probability against the step, one curve per temperature."""
    from prefopt_ray.gold.bandit import bandit_policies

    comparisons = load_spec(sweep.folder / "spec.yaml").data.train.split
    figure, panels = _panels_by_loss(sweep, xlabel="optimizer step", ylabel="probability of the action a")
    for axes, trials in panels:
        axes.set_xscale("symlog", linthresh=10)
        axes.set_ylim(0, 1.02)
        for trial, colour in _coloured(trials):
            log = EvaluationLog.load(sweep.folder / "trials" / trial.trial_id / "evaluations.safetensors")
            policies = bandit_policies(log, comparisons)
            _draw_curve(axes, [(step, p[0]) for step, p in policies.items()], colour, label=_values_label(trial))
    return figure


FIGURES: dict[str, Callable[[SweepRecord], Figure]] = {
    "frontier": frontier, "gold": gold, "paths": paths, "learning_rates": learning_rates, BANDIT: bandit,
}


def _gold_against(sweep: SweepRecord, x: str, *, xlabel: str) -> Figure:
    """One curve per trial; dotted: the reference's own reward. A deep fall leaves the picture, or hides the rest."""
    figure, panels = _panels_by_loss(sweep, xlabel=xlabel, ylabel="gold reward")
    for axes, trials in panels:
        for trial, colour in _coloured(trials):
            points = _reported(trial, x, "gold/reward")
            _draw_curve(axes, points, colour, label=_values_label(trial))
            if points and 0 in trial.reports:
                axes.axhline(points[0][1], color=GREY, linestyle=":", linewidth=1)
                axes.set_ylim(bottom=max(axes.get_ylim()[0], points[0][1] - SHOWN_FALL))  # shared by all panels
    return figure


def _panels_by_loss(
    sweep: SweepRecord, *, xlabel: str, ylabel: str
) -> tuple[Figure, list[tuple[Axes, list[TrialRecord]]]]:
    """One panel per loss, in the order of the trials, with shared axes."""
    by_loss: dict[str, list[TrialRecord]] = {}
    for trial in sorted(sweep.trials.values(), key=lambda trial: trial.number):
        by_loss.setdefault(trial.config.loss, []).append(trial)
    size = (PANEL_INCHES[0] * len(by_loss), PANEL_INCHES[1])
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(by_loss), sharex=True, sharey=True, squeeze=False)[0]
    for panel, loss in zip(axes, by_loss, strict=True):
        panel.set(title=loss, xlabel=xlabel)
    axes[0].set_ylabel(ylabel)
    return figure, list(zip(axes, by_loss.values(), strict=True))


def _root(kl: np.ndarray) -> np.ndarray:
    """KL estimated from samples may be a hair below zero; the scale must not warn about it."""
    return np.sqrt(np.maximum(kl, 0.0))


def _coloured(trials: list[TrialRecord]) -> Iterator[tuple[TrialRecord, tuple[float, ...]]]:
    """Trials in the order of their values, dark to light."""
    ordered = sorted(trials, key=lambda trial: tuple(trial.values.values()))
    shades = mpl.colormaps[_COLOURS](np.linspace(0, 0.85, len(ordered)))
    yield from ((trial, tuple(shade)) for trial, shade in zip(ordered, shades, strict=True))


def _values_label(trial: TrialRecord) -> str:
    return " ".join(f"{name}={value:g}" for name, value in trial.config.loss_params.items())


def _reported(trial: TrialRecord, x: str, y: str) -> _Points:
    """(x, y) of every report that has both, in step order; x may be STEP."""
    rows = [{STEP: float(step), **trial.reports[step].metrics} for step in sorted(trial.reports)]
    return [(row[x], row[y]) for row in rows if x in row and y in row]


def _last_gains(trials: list[TrialRecord]) -> _Points:
    """(learning rate, gain at the last evaluation) of those that had one, by learning rate."""
    curves = [(trial.config.learning_rate, _reported(trial, STEP, "eval/gain")) for trial in trials]
    return sorted((rate, points[-1][1]) for rate, points in curves if points)


def _draw_curve(axes: Axes, points: _Points, colour: str | tuple[float, ...], *, label: str) -> None:
    if points:
        axes.plot(*zip(*points), color=colour, marker="o", markersize=3, label=label)
