"""The schedulers that have rungs: where they are, what `validate` says of them, and what they leave unread."""

from pathlib import Path

import pytest
from spec.spec_examples import example

from prefopt_ray.cli import main
from prefopt_ray.errors import SpecError
from prefopt_ray.tuning.rungs import FixedStops, LockstepHalving, PromotionHalving, StopRule, SuccessiveHalving, rule_of

QUICKSTART = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"
RULES = {
    "asha": SuccessiveHalving, "asha_promotion": PromotionHalving, "lockstep": LockstepHalving, "none": StopRule,
}


@pytest.mark.parametrize("kind", RULES)
def test_a_kind_is_its_rule_with_the_rungs_of_the_preset(kind: str) -> None:
    settings = {} if kind == "none" else {"preset": "aggressive"}
    spec = example(scheduler={"kind": kind, **settings})
    rungs = () if kind == "none" else (10, 40)
    assert spec.rung_steps(160) == rungs
    rule = rule_of(spec.scheduler, spec.rung_steps(160))
    assert type(rule) is RULES[kind] and rule.rungs == rungs
    assert kind == "none" or rule.keep_one_in == 4


def test_given_stop_steps_are_the_fixed_rule_s() -> None:
    spec = example(scheduler={"kind": "fixed", "stop_steps": {1: 20}}, eval={"at": 0}, samples={"at": "never"})
    assert rule_of(spec.scheduler, ()) == FixedStops(steps={1: 20})


@pytest.mark.parametrize("kind", ["asha_promotion", "lockstep"])
def test_stop_steps_beside_rungs_are_refused(kind: str) -> None:
    with pytest.raises(SpecError, match="stop_steps"):
        example(scheduler={"kind": kind, "stop_steps": {1: 20}})


@pytest.mark.parametrize(("changes", "said"), [
    (["scheduler.kind=lockstep"], "lockstep, 1 in 2 goes on at steps 40, 80 of 160"),
    (["scheduler.preset=standard", "training.epochs=2"], "asha, 1 in 3 goes on at 11%, 33% of the training"),
    (["scheduler.kind=none"], "scheduler none"),
])
def test_validate_shows_the_rungs(changes: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [part for change in changes for part in ("--set", change)]
    assert main(["validate", str(QUICKSTART), *overrides]) == 0
    assert capsys.readouterr().out.rstrip().endswith(said)
