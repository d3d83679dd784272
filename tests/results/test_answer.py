"""The answer: who is first, by how much, and what is not claimed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sweep_folder import STEP, margins, write_sweep

from prefopt_ray.results.answer import finalists, find_answer, to_confirm
from prefopt_ray.report.lines import answer_json, answer_lines, leaderboard


def test_a_clear_winner_is_named_with_its_margin_over_the_baseline(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0, "bad": 0.0})
    answer = find_answer(sweep)
    assert answer.winner.trial_id == "good" and answer.adapter_beats_baseline
    assert answer.over_baseline.low > 0 and not answer.alike
    assert answer_lines(sweep, answer)[0].startswith("Best adapter: ")


def test_with_one_seed_each_nothing_is_claimed_of_configurations(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0})
    answer = find_answer(sweep)
    assert not answer.beats_baseline
    text = " ".join(answer_lines(sweep, answer))
    assert "this adapter is better than the baseline's; one seed cannot say whether the configuration is" in text
    assert answer_json(sweep, answer)["best"]["claim"] == "adapter"


def test_equal_configurations_are_never_called_better(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.500, "twin": 0.502})
    answer = find_answer(sweep)
    assert not answer.adapter_beats_baseline
    assert {alike.trial.trial_id for alike in answer.alike} == {"base", "twin"} - {answer.winner.trial_id}
    assert answer_lines(sweep, answer)[0].startswith("Nothing")


def test_when_the_baseline_is_first_that_is_the_answer(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 1.0, "worse": 0.1})
    lines = answer_lines(sweep, find_answer(sweep))
    assert lines[0].startswith("Nothing beats the baseline")
    assert not any("Minus the baseline" in line for line in lines)


def test_one_that_does_better_on_test_is_said_to_and_not_called_alike(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.1, "first": (1.0, 0.2), "unlucky": (0.98, 1.0)}, pairs=800)
    answer = find_answer(sweep)
    assert answer.winner.trial_id == "first"  # selection is by select, whatever test says
    assert [alike.trial.trial_id for alike in answer.alike if alike.better] == ["unlucky"]
    lines = answer_lines(sweep, answer)
    assert lines[0].startswith("No clear best") and "unlucky" in lines[0]
    assert answer_json(sweep, answer)["better_on_test"] == ["unlucky"]


def test_the_quoted_gain_is_of_the_test_part_and_the_difference_is_paired(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0}, pairs=500)
    answer = find_answer(sweep)

    def losses(strength: float) -> np.ndarray:
        h = margins(strength, pairs=500, seed=2).astype(np.float32).astype(float)
        scale = min(np.linspace(0, 20, 20_001), key=lambda a: np.logaddexp(0, -a * h).mean())
        return np.logaddexp(0, -scale * h) / np.log(2)

    good, base = losses(1.0), losses(0.2)
    assert answer.test_gain.gain == pytest.approx(1 - good.mean(), abs=1e-6)
    assert answer.over_baseline.mean == pytest.approx((base - good).mean(), abs=1e-6)
    assert answer.over_baseline.se == pytest.approx((base - good).std(ddof=1) / np.sqrt(500), rel=1e-2)


def test_without_a_test_pass_nothing_is_quoted_from_it(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0}, tested=False)
    answer = find_answer(sweep)
    assert answer.test_gain is None and "optimistic" in " ".join(answer_lines(sweep, answer))


def test_no_valid_score_is_no_winner_but_every_row_stays(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": float("nan"), "also": float("nan")}, tested=False)
    answer = find_answer(sweep)
    assert answer.winner is None and len(leaderboard(answer)) == 2
    assert answer_lines(sweep, answer)[0].startswith("No configuration")
    assert finalists(sweep) == []


def test_finalists_are_those_near_the_best_and_always_the_baseline(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": 1.0, "near": 0.99, "far": 0.1}, tested=False)
    assert {trial.trial_id for trial in finalists(sweep)} == {"good", "near", "base"}


def test_rank_is_by_score_then_drift_then_id(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"b": 0.5, "a": 0.5, "c": 0.9}, tested=False)  # b and a tie in score and drift
    assert [s.trial.trial_id for s in find_answer(sweep).standings] == ["c", "a", "b"]


def test_the_answer_is_json_even_when_nothing_is_known(tmp_path: Path) -> None:
    import json

    sweep = write_sweep(tmp_path, {"base": 0.2}, pairs=2)
    json.loads(json.dumps(answer_json(sweep, find_answer(sweep)), allow_nan=False))


def test_a_gold_sweep_without_samples_at_step_0_still_answers(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0})
    for trial in sweep.trials.values():
        trial.reports[STEP].metrics["gold/reward"] = 1.25
    lines = " ".join(answer_lines(sweep, find_answer(sweep)))
    assert "gold reward): 1.25 for the best" in lines and "base model has" not in lines


def test_a_finalist_that_could_not_be_scored_is_named(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0}, tested=False)
    sweep.untested["good"] = "step-00000004/state.json: does not match its sha256"
    assert "could not be scored on test: step-00000004" in " ".join(answer_lines(sweep, find_answer(sweep)))


def test_the_next_in_rank_is_scored_on_test_however_far_behind_on_select(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "first": 1.5, "second": 0.5, "third": 0.3}, pairs=800, tested=False)
    assert [trial.trial_id for trial in finalists(sweep)] == ["first", "second", "base"]


def test_a_baseline_that_ranks_first_is_confirmed_against_the_next(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 1.0, "second": 0.5, "third": 0.3})
    assert [c.trial_id for c in to_confirm(sweep, top=1)] == ["base", "second"]
    assert [c.trial_id for c in to_confirm(sweep, top=2)] == ["base", "second", "third"]


def test_a_gain_that_was_there_before_training_is_announced(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.1, "first": 1.0})
    assert not any("before any training" in warning for warning in find_answer(sweep).warnings)
    first = sweep.trials["first"]
    first.reports[0] = replace(first.reports[STEP], step=0, metrics={"eval/gain": 0.03, "eval/gain_se": 0.01})
    assert any("0.0300 before any training" in warning for warning in find_answer(sweep).warnings)
    first.reports[0] = replace(first.reports[0], metrics={"eval/gain": 0.01, "eval/gain_se": 0.01})
    assert not any("before any training" in warning for warning in find_answer(sweep).warnings)


def test_an_answer_from_a_base_in_four_bits_says_so(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.2, "good": 1.0})
    assert not any("4 bits" in line for line in answer_lines(sweep, find_answer(sweep)))
    sweep.facts["quantisation"] = "nf4"
    assert any("4 bits (nf4)" in line for line in answer_lines(sweep, find_answer(sweep)))
