"""Figures of a trial, drawn from its reports.

Knows matplotlib, TrialConfig and Report; not where reports come from, nor notebooks beyond IPython's PNG protocol.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefopt_ray.trial import Report, TrialConfig

SIZE_INCHES = (10.0, 5.8)
SHOWN_DPI, DRAWN_DPI = 80, 160  # drawn at twice the size it is shown, for screens with dense pixels
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # of Okabe and Ito's set, apart for the colour-blind


@dataclass(frozen=True)
class Curve:
    """One metric against the step. `error_metric` is drawn as a band of two standard errors."""

    metric: str
    label: str
    colour: str = BLUE
    error_metric: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]


PANELS = (
    Panel("Gain on select", "bits per pair", (
        Curve("eval/gain", "gain, ± 2 standard errors", error_metric="eval/gain_se"),
    )),
    Panel("Accuracy", "share of pairs", (
        Curve("probe/rewards/accuracy", "trained pairs (probe)", ORANGE),
        Curve("eval/rewards/accuracy", "held-out pairs (select)"),
    )),
    Panel("Gold reward of the policy's samples", "reward per completion", (Curve("gold/reward", "gold reward"),)),
    Panel("Drift of the policy's samples", "KL to reference, nats per token", (
        Curve("samples/kl_per_token", "KL to the reference"),
    )),
)  # fmt: skip
DRIFT_METRIC = "samples/kl_per_token"


class TrialPlot:
    """One trial against the optimizer step: gain, accuracy, gold reward and drift, as far as they were measured.

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
        """Drawn from every report so far. Not one of pyplot's figures: nothing has to be closed."""
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        figure.suptitle(self._headline(), x=0.01, ha="left", fontsize=11)
        panels = [panel for panel in PANELS if any(_points(self._reports, curve.metric) for curve in panel.curves)]
        grid = figure.subplots(2, 2, sharex=True).flat
        for axes, panel in zip(grid, panels, strict=False):
            self._draw(axes, panel)
        for axes in grid:
            axes.set_visible(False)
        return figure

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        png = io.BytesIO()
        self.figure().savefig(png, format="png", dpi=DRAWN_DPI)
        width, height = (int(inches * SHOWN_DPI) for inches in SIZE_INCHES)
        return png.getvalue(), {"width": width, "height": height}
