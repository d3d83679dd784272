"""Replaying recorded curves: sweeps computed by hand, nothing read from the future, nothing made up."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_folder import write_sweep

from prefopt_ray.cli import main
from prefopt_ray.errors import DataError, SweepError
from prefopt_ray.results.curves import Curve, CurveTable, read_table
from prefopt_ray.trial import EndState
from prefopt_ray.tuning.replay import (
    CANDIDATES,
    DEFAULT_SCHEDULERS,
    SHIPPED,
    Measured,
    measure,
    parse_scheduler,
    play,
    replay_lines,
)
from prefopt_ray.tuning.rungs import LockstepHalving, PromotionHalving, StopRule, SuccessiveHalving

STEPS = (1, 3, 9)


def curve(name: str, *values: float, steps: tuple[int, ...] = STEPS, baseline: bool = False) -> Curve:
    return Curve(name, "sigmoid", steps, values, baseline=baseline)


def one(table: CurveTable, scheduler: str, *, slots: int = 1, orders: int = 5) -> Measured:
    (measured,) = measure([table], [parse_scheduler(scheduler)], slots=slots, orders=orders, within_loss=True)
    return measured


NINE = tuple(curve(f"t{n}", 0.1 * n, 0.1 * n, 0.1 * n) for n in range(9))


# -- by hand ---------------------------------------------------------------------------------------


def test_training_everything_costs_everything_and_loses_nothing() -> None:
    measured = one(CurveTable("nine", NINE), "none", slots=4)
    assert (measured.regret.mean, measured.steps.mean, measured.time.mean) == (0.0, 1.0, 1.0)
    assert measured.best_reached == measured.baseline_whole == measured.whole == 1.0


@pytest.mark.parametrize("order", [range(9), reversed(range(9))])
def test_lockstep_costs_what_the_arithmetic_says(order: range) -> None:
    played = play([NINE[n] for n in order], LockstepHalving((1, 3), 3), slots=1, within_loss=True)
    trained = sum(NINE[0].steps[made - 1] for made in played.evaluations.values())
    assert trained == 9 * 1 + 3 * 2 + 1 * 6 == played.time  # 9 to step 1, 3 of them to step 3, 1 to step 9
    assert played.evaluations["t8"] == 3 and played.evaluations["t7"] == played.evaluations["t6"] == 2


def test_lockstep_waits_for_the_slowest_of_a_rung() -> None:
    slow = replace(curve("slow", 0.1, 0.1, steps=(1, 2)), seconds=(5.0, 6.0))
    fast = [replace(curve(f"f{n}", 0.5 + n, 0.5 + n, steps=(1, 2)), seconds=(1.0, 2.0)) for n in range(3)]
    assert play([slow, *fast], LockstepHalving((1,), 2), slots=2, within_loss=True).time == 5 + 1
    falling = [slow, *reversed(fast)]  # the best first: the others are stopped at once
    assert play(falling, SuccessiveHalving((1,), 2), slots=2, within_loss=True).time == 5


def test_a_late_winner_that_stopping_loses_is_called_back() -> None:
    late = [curve("a", 0.9, 0.9, 0.9), curve("b", 0.8, 0.8, 0.8), curve("late", 0.7, 0.8, 1.5)]
    order = [*late, *(curve(f"c{n}", 0.1, 0.1, 0.1) for n in range(6))]
    stopped = play(order, SuccessiveHalving((1,), 3), slots=1, within_loss=True)
    assert stopped.evaluations["late"] == 1  # .7 among .9 and .8
    paused = play(order, PromotionHalving((1,), 3), slots=1, within_loss=True)
    assert paused.evaluations["late"] == 3  # the third of nine


def test_the_baseline_is_trained_to_its_end_whatever_it_is_worth() -> None:
    table = CurveTable("nine", (*NINE[1:], curve("base", -1.0, -1.0, -1.0, baseline=True)))
    for scheduler in DEFAULT_SCHEDULERS:
        assert one(table, scheduler).baseline_whole == 1.0, scheduler


def test_regret_is_in_units_of_the_error_where_one_was_recorded() -> None:
    crossing = CurveTable("two", (curve("a", 0.5, 0.5, 0.5), curve("b", 0.1, 0.2, 0.6)), error=0.05)
    measured = one(crossing, "fixed:3")
    assert measured.regret.mean == pytest.approx(0.1) and measured.regret_in_errors.mean == pytest.approx(2.0)
    assert measured.best_reached == 0.0 and measured.steps.mean == 6 / 18
    spread = np.std([0.5, 0.6], ddof=1)
    unknown = one(replace(crossing, error=None), "fixed:3")
    assert unknown.regret_in_errors.mean == pytest.approx(0.1 / spread)


def test_losses_are_compared_apart_unless_asked_otherwise() -> None:
    good = [replace(c, loss="hinge") for c in NINE[6:]]
    within = play([*NINE[:3], *good], LockstepHalving((1,), 3), slots=1, within_loss=True)
    across = play([*NINE[:3], *good], LockstepHalving((1,), 3), slots=1, within_loss=False)
    assert sorted(name for name, made in within.evaluations.items() if made == 3) == ["t2", "t8"]
    assert sorted(name for name, made in across.evaluations.items() if made == 3) == ["t7", "t8"]


# -- laws ------------------------------------------------------------------------------------------

KINDS = [kind for kind in (*SHIPPED, *CANDIDATES) if kind != "fixed"]


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), slots=st.integers(1, 4))
def test_what_a_trial_would_have_reached_later_changes_no_decision(kind: str, seed: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    table = CurveTable("drawn", tuple(
        curve(f"t{n}", *np.maximum.accumulate(rng.random(5)), steps=(1, 2, 4, 8, 16)) for n in range(8)
    ))
    scheduler = parse_scheduler(kind if kind == "none" else f"{kind}:12%/2")
    played = play(table.curves, scheduler.rule(table), slots=slots, within_loss=True)

    def otherwise(c: Curve) -> Curve:
        known = played.evaluations[c.trial]
        return replace(c, values=(*c.values[:known], *(float(v) for v in rng.random(5 - known) + 5)))

    changed = [otherwise(c) for c in table.curves]
    assert play(changed, scheduler.rule(table), slots=slots, within_loss=True) == played


@pytest.mark.parametrize("kind", KINDS)
def test_every_scheduler_keeps_one_to_the_end_and_never_costs_more_than_all(kind: str) -> None:
    measured = one(CurveTable("nine", NINE), kind, slots=2, orders=20)
    assert 0 < measured.steps.mean <= 1.0 and measured.whole >= 1 / 9
    assert measured.regret.low >= 0.0


def test_rungs_are_steps_that_were_evaluated() -> None:
    table = CurveTable("few", tuple(
        curve(f"t{n}", 0.1, 0.2, 0.3, 0.4, steps=(2, 20, 60, 160)) for n in range(3)
    ))
    assert parse_scheduler("asha:standard").rungs(table) == (20, 60)  # asked for 18 and 53
    assert parse_scheduler("none").rungs(table) == ()
    assert parse_scheduler("median:standard").rungs(table) == (20, 60)


# -- tables ----------------------------------------------------------------------------------------


def test_a_sweep_is_a_table_and_trials_that_were_cut_are_left_out_and_counted(tmp_path: Path) -> None:
    from prefopt_ray.results.ledger import LEDGER_FILE

    write_sweep(tmp_path, {"0000": 0.5, "0001": 0.8, "0002": 0.2})
    ledger = tmp_path / LEDGER_FILE
    assert read_table(tmp_path) == read_table(ledger)
    whole = read_table(tmp_path)
    assert [c.trial for c in whole.curves] == ["0000", "0001", "0002"] and whole.curves[0].baseline
    lines = ledger.read_text().splitlines(keepends=True)
    ended = next(i for i, line in enumerate(lines) if '"event": "end"' in line and '"0002"' in line)
    lines[ended] = lines[ended].replace(EndState.COMPLETED, EndState.STOPPED_EARLY)
    ledger.write_text("".join(lines))
    cut = read_table(tmp_path)
    assert [c.trial for c in cut.curves] == ["0000", "0001"] and cut.left_out == {"stopped_early": 1}
    said = replay_lines([cut], [one(cut, "none")], slots=1, orders=5)
    assert cut.objective == "gain" and "regret, bits" in "".join(said)
    assert "left out, since nobody knows how they go on: 1 stopped_early" in said[0]


def test_a_trial_that_its_own_guard_ended_early_is_whole(tmp_path: Path) -> None:
    from prefopt_ray.results.ledger import LEDGER_FILE

    write_sweep(tmp_path, {"0000": 0.5, "0001": 0.8})
    ledger = tmp_path / LEDGER_FILE
    text = ledger.read_text().replace(f'"{EndState.COMPLETED}"', f'"{EndState.STOPPED_EARLY}"')
    ledger.write_text(text)
    with pytest.raises(DataError, match="2 stopped_early"):
        read_table(tmp_path)
    ledger.write_text(text.replace('"end_state": null', f'"end_state": "{EndState.STOPPED_EARLY}"'))  # in its reports
    assert len(read_table(tmp_path).curves) == 2


def test_an_objective_that_is_no_gain_has_no_error_in_bits(tmp_path: Path) -> None:
    from prefopt_ray.results.ledger import LEDGER_FILE

    write_sweep(tmp_path, {"0000": 0.5, "0001": 0.8})
    ledger = tmp_path / LEDGER_FILE
    text = ledger.read_text().replace('"eval/rewards/accuracy": 0.6', '"eval/gain_se": 0.6')
    ledger.write_text(text)
    assert read_table(tmp_path).error == 0.6
    ledger.write_text(text.replace('"objective": "eval/gain"', '"objective": "judge/win_lcb"'))
    table = read_table(tmp_path)
    assert table.objective == "judge/win_lcb" and table.error is None
    said = replay_lines([table], [one(table, "none")], slots=1, orders=5)
    assert "best judge/win_lcb 0." in said[0] and "bits" not in "".join(said)


def test_a_spreadsheet_s_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    rows = "trial,step,value\na,1,0.1\nb,1,0.2\n"
    (tmp_path / "table.csv").write_text(rows, encoding="utf-8-sig")
    assert len(read_table(tmp_path / "table.csv").curves) == 2


def test_a_file_that_is_no_table_is_told_what_is_one(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("name: mine\n")
    with pytest.raises(DataError, match=r"a table of curves is a \.csv or \.jsonl file"):
        read_table(tmp_path / "spec.yaml")


def test_a_plain_table_is_read_with_its_best_so_far(tmp_path: Path) -> None:
    rows = "trial,step,value,seconds,loss,baseline,end\n"
    rows += "b,1,0.2,1.5,hinge,,\nb,2,0.1,3.0,hinge,,\na,2,0.3,2,sigmoid,true,\na,1,,1,sigmoid,true,\n"
    rows += "short,1,0.4,1,hinge,,\ndead,1,-1,1,hinge,,diverged\n"
    (tmp_path / "table.csv").write_text(rows)
    table = read_table(tmp_path / "table.csv")
    first, second, dead = table.curves
    assert first == Curve("a", "sigmoid", (1, 2), (-1.0, 0.3), (1.0, 2.0), baseline=True)
    assert second == Curve("b", "hinge", (1, 2), (0.2, 0.2), (1.5, 3.0))
    assert dead.steps == (1,) and table.left_out == {"ended before the last step, without a reason": 1}
    assert table.common_steps == (1, 2) and table.has_seconds


@pytest.mark.parametrize(("text", "said"), [
    ('{"trial": "a", "step": 1}', "table.jsonl:1 value: is missing"),
    ('{"trial": "a", "step": 1.5, "value": 1}', "step: got 1.5; must be a whole number"),
    ('{"trial": "a", "step": 1, "value": "x"}', "value: got 'x'; must be a number"),
    ('{"trial": "a", "step": 1, "value": 1e999}', "must be finite"),
    ("[1]", "must be one JSON object"),
    ('{"trial": "a", "step": 1, "value": 1}\n{"trial": "a", "step": 1, "value": 2}', "twice at one step"),
    ('{"trial": "a", "step": 1, "value": 1}', "compares at least two"),
    ('{"trial": "a", "step": 1, "value": null}', "value: got null; is missing"),
    ('{"trial": "a", "step": 1, "value": 1, "end": "finished"}', "end: got 'finished'; must be one of completed"),
    ('{"trial": "a", "step": 1, "value": 1, "seconds": 9}\n{"trial": "a", "step": 2, "value": 1, "seconds": 8}',
     "fewer at a later step"),
    ("\n".join(f'{{"trial": "{t}", "step": 1, "value": 1, "baseline": true}}' for t in "ab"), "at most one"),
])
def test_a_table_that_says_nothing_sure_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text(text)
    with pytest.raises(DataError) as refused:
        read_table(tmp_path / "table.jsonl")
    assert said in str(refused.value)


@pytest.mark.parametrize("text", ["asah", "asha:quick", "asha:10%", "asha:0%/3", "asha:10%/1", "fixed", "none:1"])
def test_a_scheduler_that_is_none_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(SweepError, match="--scheduler") as refused:
        parse_scheduler(text)
    assert ("did you mean asha?" in str(refused.value)) == (text == "asah")


def test_a_rule_of_ones_own_is_played_like_the_shipped_ones() -> None:
    class OnlyTheFirst(StopRule):
        def decide(self, arrival):
            from prefopt_ray.results.ledger import Decision

            return Decision(arrival.step, arrival.value, None, 1, keep=arrival.number == 1, reason="for a test")

    assert set(play(NINE, OnlyTheFirst(), slots=3, within_loss=True).evaluations.values()) == {1, 3}


def test_the_guide_s_own_rule_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "schedulers.md").read_text()
    monkeypatch.setattr("prefopt_ray.tuning.replay.CANDIDATES", dict(CANDIDATES))
    code = "\n".join(part.split("```")[0] for part in guide.split("```python")[1:])
    exec(compile(code, "schedulers.md", "exec"), {"__name__": "schedulers"})
    flat, rising = curve("flat", 0.5, 0.5, 0.5), curve("rising", 0.1, 0.2, 0.3)
    table = CurveTable("two", (flat, rising))
    rule = parse_scheduler("plateau:11%/3").rule(table)
    assert play([flat, rising], rule, slots=1, within_loss=True).evaluations == {"flat": 2, "rising": 3}


def test_the_guide_names_every_scheduler() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "schedulers.md").read_text()
    assert all(f"`{kind}`" in guide for kind in (*SHIPPED, *CANDIDATES))


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text("".join(
        json.dumps({"trial": c.trial, "step": step, "value": value}) + "\n"
        for c in NINE for step, value in zip(c.steps, c.values, strict=True)
    ))
    arguments = ["replay", str(path), "--scheduler", "none", "--scheduler", "lockstep:11%/3", "--orders", "3"]
    assert main([*arguments, "--json", "--slots", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    everything, lockstep = found["schedulers"]
    assert everything["steps"]["mean"] == 1.0 and lockstep["steps"]["mean"] == pytest.approx(21 / 81)
    assert lockstep["rungs"] == [[1, 3]]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "table: 9 curves to step 9, time in steps, best objective 0.8000" in out and "26% [26%, 26%]" in out
    assert main(["replay", str(tmp_path / "none")]) == 2
