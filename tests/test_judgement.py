"""Whom a judge looks at after a sweep, and what is said of what it took."""

from dataclasses import replace
from pathlib import Path

import pytest
from sweep_folder import STEP, write_sweep

from prefopt_ray.results.judgement import JudgedFinalist, Judgement, finalists_to_judge, judgement_lines
from prefopt_ray.judges.base import Prompt, Tally
from prefopt_ray.judges.functions import FunctionScores
from prefopt_ray.judges.tournament import REFERENCE_NAME, Tournament, play
from prefopt_ray.results.ledger import CONFIRM, SweepRecord, TrialRecord
from prefopt_ray.train.scorers import Completion


def confirmed_sweep(folder: Path) -> SweepRecord:
    """`good` and the baseline were trained again; `fair` was not, and `broken` never counted."""
    sweep = write_sweep(folder, {"base": 0.2, "good": 1.0, "fair": 0.6, "broken": float("nan")})
    for name in ("base", "good"):
        sweep.trials[f"{name}-again"] = trained_again(sweep.trials[name], number=len(sweep.trials))
    return sweep


def trained_again(trial: TrialRecord, *, number: int) -> TrialRecord:
    config = replace(trial.config, seed=11, training=replace(trial.config.training, stop_step=STEP))
    name = f"{trial.trial_id}-again"
    return replace(trial, trial_id=name, number=number, config=config, configuration=trial.trial_id, role=CONFIRM)


def judged(sweep: SweepRecord, *, top: int, also_searched: bool) -> list[str]:
    return [f.trial_id for f in finalists_to_judge(sweep, top=top, also_searched=also_searched)]


def test_after_a_confirmation_its_runs_are_judged_and_the_search_when_asked_for(tmp_path: Path) -> None:
    sweep = confirmed_sweep(tmp_path)
    assert judged(sweep, top=2, also_searched=False) == ["good-again", "base-again"]
    assert judged(sweep, top=2, also_searched=True) == ["good-again", "base-again", "good", "fair"]
    assert judged(sweep, top=16, also_searched=True) == ["good-again", "base-again", "good", "fair", "base"]


@pytest.mark.parametrize("also_searched", [True, False])
def test_without_a_confirmation_the_first_and_the_baseline_are_judged(tmp_path: Path, also_searched: bool) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0, "fair": 0.6})
    assert judged(sweep, top=1, also_searched=also_searched) == ["good", "base"]


@pytest.mark.parametrize(("tally", "said"), [
    (Tally(asked=30, cached=6, usd=0.0123),
     ["Note: the judge was called 30 times, for $0.01; 6 answers came from the cache."]),
    (Tally(asked=36), ["Note: the judge was called 36 times; 0 answers came from the cache."]),
    (Tally(), []),
])
def test_what_an_endpoint_took_is_said_and_of_others_there_is_nothing_to_say(tally: Tally, said: list[str]) -> None:
    assert judgement_lines(judgement(tally), best="a")[1:] == said


def test_the_confirmed_baseline_is_the_baseline_that_is_named() -> None:
    lines = judgement_lines(judgement(Tally()), best="a")
    assert "the baseline wins 0 %" in lines[0]


def judgement(tally: Tally) -> Judgement:
    """`a` wins everything; of the baseline's two trainings the first in the answer's order always loses."""
    worth = {"a": 2.0, "base-again": -1.0, "base": 1.0, REFERENCE_NAME: 0.0}
    samples = {name: [Completion(str(value), 1, finished=True)] * 4 for name, value in worth.items()}
    judge = FunctionScores("worth", lambda prompts, completions: [float(c.text) for c in completions])
    tournament: Tournament = play(judge, [Prompt(str(number)) for number in range(4)], samples)
    finalists = tuple(
        JudgedFinalist(name, STEP, 0.1, baseline=name != "a", label=name) for name in ("a", "base-again", "base")
    )
    return Judgement("worth", finalists, replace(tournament, tally=tally))
