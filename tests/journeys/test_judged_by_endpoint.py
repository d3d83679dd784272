"""A sweep judged over HTTP, as a person runs it: its key stays in the environment, and what cannot work is refused
before anything is trained."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from journeys.journey import Outcome, prefopt, spec_text
from judges.judge_server import Played, judge_server, prefers_longer

from prefopt_ray.cli import main
from prefopt_ray.results.ledger import SweepRecord, read_sweep

KEY = "sk-journey-4f1d0c9b8a7e6f5d"
PRICES = "{input: 1.0, output: 10.0}"


@dataclass(frozen=True)
class JudgedSweep:
    home: Path
    outcome: Outcome
    record: SweepRecord
    server: Played


@pytest.fixture(scope="module")
def judged(chat_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgedSweep]:
    home = tmp_path_factory.mktemp("endpoint")
    with judge_server(prefers_longer) as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("JUDGE_KEY", KEY)
        endpoint = f"{{url: {server.url}, model: played, key_env: JUDGE_KEY, usd_per_million_tokens: {PRICES}}}"
        (home / "sweep.yaml").write_text(spec_text(
            chat_model, pairs_file,
            training="{steps: 8, batch_pairs: 8, warmup: 0}",
            search="{method: grid, losses: {sigmoid: {beta: 0.1}}, shared: {learning_rate: [1e-3, 1e-2]},"
                   " baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-3}}",
            eval="{at: [100%], train_probe: 8}", samples="{at: [100%], prompts: 4, max_new_tokens: 8}",
            judge=f"{{endpoint: {endpoint}, at: rungs, prompts: 6}}", objective="{metric: judge}",
        ))
        outcome = prefopt("run", "sweep.yaml", "--json", cwd=home)
        assert outcome.code == 0, outcome.err
        (ledger,) = (home / "prefopt-results").glob("*/ledger.jsonl")
        yield JudgedSweep(home, outcome, read_sweep(ledger.parent), server)


def test_the_endpoint_s_taste_decides(judged: JudgedSweep) -> None:
    (judgement,) = json.loads(judged.outcome.out)["judgements"]
    for contest in judgement["tournament"]["contests"]:
        first, second = (lengths(judged.record, contest[side]) for side in ("first", "second"))
        assert contest["wins"] == sum(a > b for a, b in zip(first, second, strict=True))
        assert contest["ties"] == sum(a == b for a, b in zip(first, second, strict=True))
    tally = judgement["tournament"]["tally"]
    assert tally["asked"] + tally["cached"] == 6 * 3 * 2  # prompts, contests of two trials and the reference, orders
    assert tally["usd"] == pytest.approx(tally["asked"] * (100 * 1.0 + 10 * 10.0) / 1e6)
    scores = {trial.score for trial in judged.record.trials.values()}
    assert all(0 <= score <= 1 for score in scores)
    assert set(judged.server.keys) == {f"Bearer {KEY}"}


def test_the_key_is_in_no_file_and_no_output(judged: JudgedSweep) -> None:
    written = [path for path in judged.home.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in written) and any("judge" in path.parts for path in written)
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert KEY not in judged.outcome.out + judged.outcome.err


def test_judging_again_pays_for_nothing(judged: JudgedSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    before = len(judged.server.bodies)
    assert main(["judge", str(judged.record.folder)]) == 0
    assert len(judged.server.bodies) == before + 1  # the check at the start


def test_a_prompt_is_shown_as_it_was_written(judged: JudgedSweep) -> None:
    shown = judged.server.bodies[-1]["messages"][0]["content"], judged.server.bodies[5]["messages"][0]["content"]
    assert not any("<|im_start|>" in text for text in shown)


@pytest.mark.parametrize(("judge", "said"), [
    ("{endpoint: {url: http://127.0.0.1:9/v1, model: m, key_env: NO_SUCH_KEY}}", "NO_SUCH_KEY"),
    ("{endpoint: {url: http://127.0.0.1:9/v1, model: m, retries: 0}}", "127.0.0.1:9"),
    ("{callable: no_such_judge:score}", "no_such_judge:score"),
    ("{reward_model: ./no-such-folder}", "no-such-folder"),
])
def test_a_judge_that_cannot_work_is_refused_before_anything_is_trained(
    chat_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str, said: str
) -> None:
    (tmp_path / "sweep.yaml").write_text(spec_text(chat_model, pairs_file, judge=judge, storage=str(tmp_path / "out")))
    assert main(["run", str(tmp_path / "sweep.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_a_judge_says_how_to_name_one(
    judged: JudgedSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ledger.jsonl", "spec.yaml"):
        (tmp_path / name).write_bytes((judged.record.folder / name).read_bytes())
    text = (tmp_path / "spec.yaml").read_text()
    start, rest = text.split("\njudge:")
    text = start + "\nobjective: {metric: gain}\n" + rest.split("\nobjective:")[1].partition("\n")[2]
    (tmp_path / "spec.yaml").write_text(text)
    assert main(["judge", str(tmp_path)]) == 2
    assert "--with reward_model=org/model" in capsys.readouterr().err
    assert main(["judge", str(tmp_path), "--with", "callable=nothing"]) == 2
    assert "package.module:function" in capsys.readouterr().err
    assert main(["judge", str(tmp_path), "--with", "nope"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prefopt: --with nope: must be") and "(write --with callable=judges.py:score)" in error


def lengths(sweep: SweepRecord, competitor: str) -> list[int]:
    lines = (sweep.folder / "judge" / f"completions-{competitor}.jsonl").read_text(encoding="utf-8").split("\n")[1:-1]
    return [len(json.loads(line)["text"]) for line in lines]
