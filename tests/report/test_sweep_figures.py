"""Figures of a sweep show what its trials reported and stored."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from tiny import random_pairs, trial_config

from prefopt_ray.cli import main
from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.errors import SweepError
from prefopt_ray.gold.bandit import bandit_policies
from prefopt_ray.results.ledger import SweepRecord, TrialRecord
from prefopt_ray.report.sweep_figures import FIGURES, draw
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.trial import EndState, Report, Verdict

STEPS = (0, 10, 20)


def trial(
    number: int, loss: str, beta: float, *, rate: float = 1e-3, end: EndState = EndState.COMPLETED
) -> TrialRecord:
    """Its gold reward rises by beta and falls again while KL grows by one per evaluation."""
    values = {"beta": beta, "learning_rate": rate}
    config = trial_config(loss, params={"beta": beta}, learning_rate=rate)
    record = TrialRecord(f"{number:04d}", number, values, config, number == 0, end_state=end)
    for at, step in enumerate(STEPS):
        metrics = {"gold/reward": 1.0 + beta * (at == 1), "samples/kl": float(at), "probe/h/mean": beta * at,
                   "eval/gain": beta * at}
        record.reports[step] = Report(step, step * 8, metrics, 0.0, 0.0, step, Verdict("healthy"), Verdict("healthy"))
    return record


def sweep(*trials: TrialRecord, folder: Path = Path("made-up")) -> SweepRecord:
    return SweepRecord(folder, sweep_id="cafe", trials={t.trial_id: t for t in trials})


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in named}


def test_the_frontier_has_a_panel_per_loss_and_a_curve_per_trial_against_kl():
    three = sweep(trial(0, "sigmoid", 0.1), trial(1, "sigmoid", 0.5), trial(2, "ipo_sum", 0.1))
    dpo, ipo = draw(three, "frontier").axes
    assert [axes.get_title(loc="left") for axes in (dpo, ipo)] == ["sigmoid", "ipo_sum"]
    assert curves(dpo) == {"beta=0.1": [(0, 1), (1, 1.1), (2, 1)], "beta=0.5": [(0, 1), (1, 1.5), (2, 1)]}
    assert curves(ipo) == {"beta=0.1": [(0, 1), (1, 1.1), (2, 1)]}


def test_paths_mark_where_ipo_wants_the_margin():
    (axes,) = draw(sweep(trial(0, "ipo_sum", 0.1), trial(1, "ipo_sum", 0.5)), "paths").axes
    assert curves(axes)["beta=0.5"] == [(0, 0), (10, 0.5), (20, 1.0)]
    targets = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert targets == [5.0, 1.0]


def test_a_diverged_trial_is_a_cross_at_its_learning_rate():
    diverged = trial(1, "sigmoid", 0.1, rate=1.0, end=EndState.DIVERGED)
    (axes,) = draw(sweep(trial(0, "sigmoid", 0.1), diverged), "learning_rates").axes
    assert curves(axes) == {"reached the end": [(1e-3, 0.2)], "diverged": [(1.0, 0.0)]}


def test_a_stopped_trial_is_a_ring_at_its_last_evaluation_and_did_not_reach_the_end():
    stopped = trial(1, "sigmoid", 0.1, rate=1e-2, end=EndState.STOPPED_EARLY)
    unevaluated = replace(stopped.reports[20], step=25, metrics={})  # how a trial ends between two evaluations
    stopped.reports[25] = unevaluated
    nothing = trial(2, "sigmoid", 0.1, rate=1e-1, end=EndState.FAILED)
    nothing.reports.clear()
    (axes,) = draw(sweep(trial(0, "sigmoid", 0.1), stopped, nothing), "learning_rates").axes
    assert curves(axes) == {"reached the end": [(1e-3, 0.2)], "stopped": [(1e-2, 0.2)]}


def test_a_figure_of_what_was_not_measured_is_refused_with_those_there_are():
    silent = trial(0, "sigmoid", 0.1)
    silent.reports.clear()
    with pytest.raises(SweepError, match="frontier, gold, paths"):
        draw(sweep(silent), "gold")


def test_every_kind_is_named_in_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["figure", "--help"])
    said = capsys.readouterr().out
    assert all(kind in said for kind in FIGURES)


def test_the_bandits_policy_is_read_from_the_stored_log_probs(tmp_path: Path):
    policy = {"a": 0.7, "b": 0.2, "c": 0.1}
    pairs = random_pairs(6)
    order = [4, 1, 0, 2, 5, 3]  # row ids need not be in order
    part = ReferencedPairs(pairs.take(np.array(order)), np.zeros((6, 2), dtype=np.float32))
    log = EvaluationLog.of_parts({"select": part})
    told = [("a", "b"), ("b", "c"), ("a", "c")]
    log.add("select", 20, np.log([[policy[side] for side in told[row % 3]] for row in order]).astype(np.float32))
    log.save(tmp_path / "evaluations.safetensors")
    stored = EvaluationLog.load(tmp_path / "evaluations.safetensors")
    assert bandit_policies(stored, "total_order")[20] == pytest.approx([0.7, 0.2, 0.1])
    assert np.isnan(bandit_policies(stored, "contradiction")[20][2])
