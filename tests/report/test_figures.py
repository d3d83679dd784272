"""The trial plot shows what the reports say, and says what was not measured."""

import numpy as np
from matplotlib.axes import Axes

from prefopt_ray.report.trial_figure import TrialPlot
from prefopt_ray.trial import EvaluationConfig, Report, TrainingConfig, TrialConfig, Verdict

CONFIG = TrialConfig(
    loss="sigmoid", loss_params={"beta": 0.1}, learning_rate=1e-3,
    training=TrainingConfig(total_steps=20, stop_step=20), evaluation=EvaluationConfig(steps=(0, 10, 20)),
)
GAINS = {0: 0.0, 10: 0.06, 20: 0.04}


def test_each_panel_draws_the_reported_values_against_their_steps() -> None:
    gain, accuracy, gold, drift = _drawn(_plot(sampled_steps=(0, 20)))
    assert _line(gain, 0) == list(GAINS.items())
    assert _line(accuracy, 1) == [(0, 0.5), (10, 0.6), (20, 0.6)]
    assert _line(gold, 0) == [(0, 1.0), (20, -0.5)]
    assert _line(drift, 0) == [(0, 0.0), (20, 1.0)]


def test_the_band_is_two_standard_errors_wide() -> None:
    (gain, *_) = _drawn(_plot())
    band = gain.collections[0].get_paths()[0].vertices
    at_ten = band[band[:, 0] == 10, 1]
    assert np.isclose(at_ten.max() - at_ten.min(), 4 * 0.01)


def test_the_best_step_and_the_drift_limit_are_marked() -> None:
    gain, *_, drift = _drawn(_plot())
    assert "best gain: step 10" in _legend(gain)
    assert "drift limit 0.3" in _legend(drift)


def test_a_metric_without_values_is_said_not_to_be_measured() -> None:
    *_, gold, drift = _drawn(_plot(sampled_steps=()))
    assert [text.get_text() for axes in (gold, drift) for text in axes.texts] == ["not measured"] * 2


def test_a_plot_without_reports_can_be_shown() -> None:
    png, size = TrialPlot(CONFIG)._repr_png_()
    assert png.startswith(b"\x89PNG") and size == {"width": 800, "height": 480}


def _plot(*, sampled_steps: tuple[int, ...] = (0, 10, 20)) -> TrialPlot:
    plot = TrialPlot(CONFIG)
    for step, gain in GAINS.items():
        metrics = {"eval/gain": gain, "eval/gain_se": 0.01, "eval/rewards/accuracy": 0.6 if step else 0.5,
                   "probe/rewards/accuracy": 0.5 + step / 50}
        if step in sampled_steps:
            metrics |= {"gold/reward": 1.0 - 0.075 * step, "samples/kl_per_token": 0.05 * step}
        plot.add(Report(step, step * 64, metrics, gain, max(gain, 0.06), 10, Verdict("healthy"), Verdict("healthy")))
    return plot


def _drawn(plot: TrialPlot) -> list[Axes]:
    figure = plot.figure()
    figure.canvas.draw()
    return figure.axes


def _line(axes: Axes, index: int) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axes.lines[index].get_xydata()]


def _legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]
