"""`prefopt explain`: the verdict of a stored trial with the numbers behind every rule."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from spec.spec_examples import example
from tiny import tiny_worker, trial_config
from train.runs import evaluated_at

from prefopt_ray.cli import main
from prefopt_ray.errors import SweepError
from prefopt_ray.report.explain import explain_trial
from prefopt_ray.results.ledger import Ledger, read_sweep
from prefopt_ray.spec import dump_spec
from prefopt_ray.thresholds import Thresholds
from prefopt_ray.train import train
from prefopt_ray.trial import Report


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A sweep of one real trial and of one that was never evaluated; the first one's last report."""
    folder = tmp_path_factory.mktemp("storage") / "made-cafe"
    config = evaluated_at(trial_config(steps=8, learning_rate=1e-2), 0, 2, 4, 6, 8, samples=(4, 8))
    ledger = Ledger(folder / "ledger.jsonl")
    (folder / "spec.yaml").write_text(dump_spec(example()))
    ledger.append("sweep", format=1, sweep_id="cafe", name="made", spec_hash="0", facts={"pairs": {}})
    for number, name in enumerate(("0000", "0001")):
        ledger.append("trial", trial=name, number=number, values={}, baseline=False, config=config.to_dict())
    for report in train(config, tiny_worker(), folder=folder / "trials" / "0000"):
        ledger.append("report", trial="0000", report=report.to_dict())
    ledger.append("end", trial="0000", end_state="completed", reason="all 8 steps")
    ledger.close()
    return folder, report


def explained(folder: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["explain", str(folder), "0000", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("at", ["best", "end"])
def test_it_says_the_recorded_verdict_and_the_numbers_of_every_rule(sweep, at: str, capsys) -> None:
    folder, last = sweep
    said = explained(folder, "--at", at, capsys=capsys)
    recorded = last.verdict_at_best if at == "best" else last.verdict
    assert said["verdict"] == said["recorded"] == json.loads(json.dumps(vars(recorded)))
    assert said["step"] == (last.best_step if at == "best" else 8)
    assert len(said["rules"]) == 13
    values = {check["threshold"]: check["value"] for rule in said["rules"] for check in rule["checks"]}
    if at == "end":
        assert values["memorised_accuracy"] == last.metrics["probe/rewards/accuracy"]
        assert values["broken_kl_per_token"] == last.metrics["samples/kl_per_token"]
        assert values["collapsed_frac"] == last.metrics["probe/collapse/rejected_frac"]


def test_as_text_it_leads_with_the_verdict_and_marks_what_holds(sweep, capsys) -> None:
    folder, last = sweep
    assert main(["explain", str(folder), "0000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("the verdict at its end, step 8") and lines[1].startswith(last.verdict.headline)
    assert "diverged: no" in lines and any("(broken_kl_per_token)" in line for line in lines)


def test_with_another_threshold_it_says_what_would_have_been_said(sweep, capsys) -> None:
    folder, last = sweep
    said = explained(folder, "--verdicts", "broken_kl_per_token=1e-9", capsys=capsys)
    assert said["verdict"]["headline"] == "broken" and said["recorded"]["headline"] == last.verdict.headline
    (rule,) = (rule for rule in said["rules"] if rule["rule"] == "broken")
    assert rule["fired"] and any(check["met"] and check["limit"] == 1e-9 for check in rule["checks"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["0009"], "got '0009'; no such trial in made-cafe (its trials: 0000, 0001)\n"),
        (["1"], "0001: was never evaluated"),
        (["0001"], "was never evaluated"),
        (["0000", "--verdicts", "overfit_zz=3"], "--verdicts overfit_zz=3 verdicts.overfit_zz: unknown key"),
        (["0000", "--verdicts", "overfit_zz=3"], "did you mean overfit_z?"),
        (["0000", "--verdicts", "overfit_z"], "prefopt: --verdicts overfit_z: must be key=value"),
        (["0000", "--verdicts", "overfit_z"], "(write --verdicts overfit_z=3)\n"),
        (["0000", "--verdicts", "overfit_evaluations=0"], "must be >= 1"),
    ],
)
def test_what_cannot_be_explained_is_refused_with_the_way_out(sweep, arguments: list[str], words: str, capsys) -> None:
    assert main(["explain", str(sweep[0]), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_trial_is_named_by_its_number_as_tables_print_it(sweep, capsys) -> None:
    said = []
    for name in ("0", "0000"):
        assert main(["explain", str(sweep[0]), name]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_of_many_trials_an_error_names_twenty(sweep) -> None:
    record = read_sweep(sweep[0])
    record.trials.update({f"{number:04d}": record.trials["0001"] for number in range(2, 23)})
    with pytest.raises(SweepError, match=r"0018, 0019 and 3 more\)$"):
        explain_trial(record, "0099", Thresholds())


# -- thresholds in a spec ------------------------------------------------------------------------------


def test_every_threshold_can_be_set_in_a_spec_and_reaches_the_verdicts() -> None:
    for field in fields(Thresholds):
        other = type(field.default)(field.default * 0.5) or 1
        assert getattr(example(verdicts={field.name: other}).thresholds, field.name) == other
    assert example().thresholds == Thresholds()


def test_thresholds_are_content_and_survive_writing() -> None:
    spec = example(verdicts={"overfit_z": 3})
    assert spec.content_hash() != example().content_hash() == example(verdicts={"overfit_z": 2.0}).content_hash()
    assert type(spec).from_dict(spec.to_dict()).thresholds.overfit_z == 3


def test_every_guard_reaches_its_trials() -> None:
    guards = {"broken": "stop", "memorised": "stop", "over_optimised": "stop", "collapsed": "stop", "displaced": "stop"}
    point = {"beta": 0.1, "learning_rate": 1e-5}
    config = example(guards=guards).trial_config("sigmoid", point, train_pairs=64)
    assert {name: getattr(config.guards, name) for name in guards} == guards
    assert (config.guards.diverged, config.guards.overfit) == ("stop", "flag")
