"""Figures of a trial, drawn from its reports.

Knows matplotlib, TrialConfig and Report, and how IPython asks for a PNG; not where reports come from.
"""

import io
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefopt_ray.trial import Report, TrialConfig

SIZE_INCHES = (10.0, 6.0)
SHOWN_DPI, DRAWN_DPI = 80, 160  # drawn at twice the size it is shown at, for screens with dense pixels
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#707070"  # two of Okabe and Ito's colours, apart for the colour-blind
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold",
         "axes.titlelocation": "left", "axes.grid": True, "grid.alpha": 0.25, "font.size": 9}
DRIFT = "samples/kl_per_token"


@dataclass(frozen=True)
class Curve:
    """One metric against the step; `error` is a metric too, drawn as a band of two standard errors."""

    metric: str
    label: str
    colour: str = BLUE
    error: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]


PANELS = (
    Panel("Gain on the select pairs", "bits per pair", (
        Curve("eval/gain", "gain, with 2 standard errors", error="eval/gain_se"),
    )),
    Panel("Accuracy", "share of pairs ranked as labelled", (
        Curve("probe/rewards/accuracy", "pairs trained on (probe)", ORANGE),
        Curve("eval/rewards/accuracy", "held-out pairs (select)"),
    )),
    Panel("Gold reward of the policy's samples", "mean reward per completion", (
        Curve("gold/reward", "true reward, which no trial sees"),
    )),
    Panel("Drift of the policy's samples", "nats per token", (
        Curve(DRIFT, "KL to the reference"),
    )),
)


class TrialPlot:
    """One trial against the optimizer step: gain, accuracy, gold reward and drift.

    IPython shows it as a PNG, so a notebook can keep it up to date while the trial runs:

        shown = display(plot, display_id=True)
        plot.add(report)
        shown.update(plot)
    """

    def __init__(self, config: TrialConfig) -> None:
        self._config = config
        self._reports: list[Report] = []

    def add(self, report: Report) -> None:
        """The trial's next report."""
        self._reports.append(report)

    def figure(self) -> Figure:
        """Drawn from every report so far. It is not one of pyplot's figures, so nothing has to be closed."""
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=SIZE_INCHES, layout="constrained")
            for axes, panel in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
                self._draw(axes, panel)
            figure.suptitle(self._headline(), x=0.01, ha="left", fontsize=11)
        return figure

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        png = io.BytesIO()
        self.figure().savefig(png, format="png", dpi=DRAWN_DPI)
        width, height = (int(inches * SHOWN_DPI) for inches in SIZE_INCHES)
        return png.getvalue(), {"width": width, "height": height}

    def _draw(self, axes: Axes, panel: Panel) -> None:
        axes.set(title=panel.title, ylabel=panel.unit)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("optimizer step")
        last_step = self._config.training.stop_step
        axes.set_xlim(-0.02 * last_step, 1.02 * last_step)  # fixed: the curve grows, the axis stays
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for curve in panel.curves:
            self._draw_curve(axes, curve)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
            return
        self._draw_marks(axes, panel)
        axes.legend(frameon=False, loc="best")

    def _draw_curve(self, axes: Axes, curve: Curve) -> None:
        reports = [report for report in self._reports if curve.metric in report.metrics]
        if not reports:
            return
        steps = [report.step for report in reports]
        values = [report.metrics[curve.metric] for report in reports]
        axes.plot(steps, values, color=curve.colour, marker="o", markersize=4, label=curve.label)
        if curve.error:
            errors = [2 * report.metrics[curve.error] for report in reports]
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=curve.colour, alpha=0.15, linewidth=0)

    def _draw_marks(self, axes: Axes, panel: Panel) -> None:
        best_step = self._reports[-1].best_step
        if best_step >= 0:
            label = f"best gain: step {best_step}" if panel is PANELS[0] else None
            axes.axvline(best_step, color=GREY, linestyle=":", linewidth=1.5, label=label)
        if any(curve.metric == DRIFT for curve in panel.curves):
            limit = self._config.guards.drift_limit_per_token
            axes.axhline(limit, color=GREY, linestyle="--", linewidth=1, label=f"drift limit {limit:g}")

    def _headline(self) -> str:
        if not self._reports:
            return self._config.label
        last = self._reports[-1]
        since = f" since step {last.verdict.onset_step}" if last.verdict.onset_step is not None else ""
        return f"{self._config.label}, step {last.step}: {last.verdict.headline}{since}"
