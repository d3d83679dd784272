"""A real sweep whose completions are judged, against rewards and win rates worked out by hand from its files."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from gold.oracle import ids, slow_reward
from judges.test_reward_model import save_reward_model

from prefopt_ray.cli import main
from prefopt_ray.errors import SweepError
from prefopt_ray.results.judgement import Judgement, judgement_lines, stored_judgements
from prefopt_ray.judges.base import Prompt, silent
from prefopt_ray.judges.reward_model import RewardModel
from prefopt_ray.results.ledger import SweepRecord, read_sweep
from prefopt_ray.prepare import open_worker
from prefopt_ray.spec import load_spec
from prefopt_ray.train.export import load_best
from prefopt_ray.train.scorers import Completion
from prefopt_ray.tuning.judging import Ground, judge_at_end, judge_sweep, questions

JUDGES = """
from prefopt_ray.gold.scorer import GoldScorer

def gold(prompts, completions):
    return GoldScorer().score(prompts, completions)
"""
SPEC = """
name: judged
model: {policy: gold, dtype: float32, adapter: {kind: lora, rank: 8, alpha: 16}}
data: {train: {source: gold, pairs: 200}, select: {source: gold, pairs: 60}, test: {source: gold, pairs: 60},
       max_tokens: 64}
training: {steps: 12, batch_pairs: 16, warmup: 0}
search: {method: grid, losses: {sigmoid: {beta: 0.1}}, shared: {learning_rate: [1e-3, 3e-3, 1e-2]},
         baseline: {loss: sigmoid, beta: 0.1, learning_rate: 1e-3}}
scheduler: {kind: none}
judge: {callable: judges.py:gold, prompts: 48, at: rungs, top: 1}
objective: {metric: judge}
eval: {at: [50%], train_probe: 16}
samples: {at: [50%, 100%], prompts: 24, max_new_tokens: 16}
resources: {gpus_per_trial: 0}
"""


@pytest.fixture(scope="module")
def judged(gold_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SweepRecord]:
    home = tmp_path_factory.mktemp("judged")
    (home / "judges.py").write_text(JUDGES)
    (home / "sweep.yaml").write_text(SPEC)
    storage = home / "results"
    (storage / "cache").mkdir(parents=True)
    (storage / "cache" / "gold").symlink_to(gold_base.parent)
    assert main(["run", str(home / "sweep.yaml"), "--storage", str(storage)]) == 0
    (ledger,) = storage.glob("*/ledger.jsonl")
    yield read_sweep(ledger.parent)
    ray.shutdown()


def test_the_numbers_are_those_of_a_count_by_hand(judged: SweepRecord) -> None:
    by_name = {judgement.judge: judgement for judgement in stored_judgements(judged.folder)}
    assert set(by_name) == {"gold", "judges.py:gold"}  # the embedded task's own reward judges without being asked
    for judgement in by_name.values():
        for contest in judgement.tournament.contests:
            gaps = rewards(judged, contest.first) - rewards(judged, contest.second)
            counted = ((gaps > 0).sum(), (gaps == 0).sum(), (gaps < 0).sum())
            assert (contest.wins, contest.ties, contest.losses) == counted
        for row in judgement.tournament.competitors:
            gaps = rewards(judged, row.competitor) - rewards(judged, "reference")
            assert row.win_rate == pytest.approx((gaps > 0).mean() + 0.5 * (gaps == 0).mean()) and row.judged == 48
            assert row.win_low < row.win_rate < row.win_high


def test_the_best_and_the_baseline_are_judged(judged: SweepRecord) -> None:
    (judgement, _) = stored_judgements(judged.folder)
    best = min(judged.trials.values(), key=lambda trial: (-trial.score, trial.trial_id))
    assert {f.trial_id for f in judgement.finalists} == {best.trial_id, judged.baseline.trial_id}
    assert {f.trial_id: f.step for f in judgement.finalists} == {
        f.trial_id: judged.trials[f.trial_id].best_step for f in judgement.finalists
    }


def test_trials_are_ranked_by_the_lower_bound_of_their_win_rate_where_it_was_measured(judged: SweepRecord) -> None:
    for trial in judged.trials.values():
        bounds = {step: r.metrics["judge/win_lcb"] for step, r in trial.reports.items() if "judge/win_lcb" in r.metrics}
        assert set(bounds) == {6, 12}
        assert trial.score == max(bounds.values()) and bounds[trial.best_step] == trial.score
        for step in bounds:  # the same completions and the same taste as the gold scorer's
            metrics = trial.reports[step].metrics
            assert metrics["judge/win_rate"] == metrics["gold/win_rate"] and metrics["judge/unjudged"] == 0
            assert metrics["judge/win_lcb"] == pytest.approx(metrics["gold/win_lcb"])


def test_every_competitor_drew_its_own_completions(judged: SweepRecord) -> None:
    heads = [head for head, _ in (completions(judged, path.stem.partition("-")[2]) for path in judge_files(judged))]
    assert len({head["seed"] for head in heads}) == len(heads)


def test_completions_are_what_the_best_checkpoint_says_at_that_seed(judged: SweepRecord) -> None:
    worker, prepared = open_worker(load_spec(judged.folder / "spec.yaml"))
    test = worker.parts["test"].tokens
    prompts = test.prompt.take(test.first_of_groups(48))
    for finalist in stored_judgements(judged.folder)[0].finalists:
        head, lines = completions(judged, finalist.trial_id)
        trial = judged.trials[finalist.trial_id]
        load_best(trial.config, worker, judged.folder / "trials" / trial.trial_id, best_step=trial.best_step)
        drawn = worker.engine.sample(0, prompts, max_new_tokens=16, seed=head["seed"])
        assert [line["tokens"] for line in lines] == drawn.completions.lengths.tolist()
        assert [line["text"] for line in lines] == [
            prepared.tokenizer.decode(drawn.completions[i].tolist(), skip_special_tokens=True) for i in range(48)
        ]
        asked = [prepared.tokenizer.decode(prompts[i].tolist(), skip_special_tokens=True) for i in range(48)]
        assert [line["prompt"].removesuffix(">").split() for line in lines] == [
            text.removesuffix(">").split() for text in asked
        ]


def test_judging_again_generates_nothing_and_says_the_same(
    judged: SweepRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in judge_files(judged)}
    ledger = (judged.folder / "ledger.jsonl").read_bytes()
    first = {judgement.judge: judgement for judgement in stored_judgements(judged.folder)}
    capsys.readouterr()
    assert main(["judge", str(judged.folder), "--json"]) == 0
    again = [Judgement.from_dict(one) for one in json.loads(capsys.readouterr().out)["judgements"]]
    assert {judgement.judge: judgement.tournament for judgement in again} == {
        name: judgement.tournament for name, judgement in first.items()
    }
    assert {path: path.stat().st_mtime_ns for path in judge_files(judged)} == before
    assert (judged.folder / "ledger.jsonl").read_bytes() == ledger


def test_more_finalists_draw_only_what_is_new(judged: SweepRecord, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in judge_files(judged)}
    function = judged.folder.parents[1] / "judges.py:gold"
    assert main(["judge", str(judged.folder), "--top", "3", "--with", f"callable={function}"]) == 0
    assert {path.stem.partition("-")[2] for path in judge_files(judged)} == {*judged.trials, "reference"}
    assert len(before) < 4 and {path: path.stat().st_mtime_ns for path in before} == before
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in judged.trials)


def test_a_reward_model_is_asked_where_trials_run(
    judged: SweepRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_reward_model(tmp_path / "taste", pad=True)
    assert main(["judge", str(judged.folder), "--with", f"reward_model={folder}", "--json"]) == 0
    (given,) = json.loads(capsys.readouterr().out)["judgements"]
    (judged.folder / "judge" / f"{str(folder).replace('/', '-').strip('-')[-80:]}.json").unlink()
    scores = {}
    for name in (given["finalists"][0]["trial_id"], "reference"):
        lines = completions(judged, name)[1]
        said = [Completion(line["text"], line["tokens"], finished=line["finished"]) for line in lines]
        prompts = [Prompt(line["prompt"]) for line in lines]
        scores[name] = RewardModel(str(folder), device="cpu").score(prompts, said, advance=silent)
    best, reference = scores.values()
    row = next(r for r in given["tournament"]["competitors"] if r["competitor"] in scores)
    assert row["win_rate"] == pytest.approx((best > reference).mean() + 0.5 * (best == reference).mean())


def test_the_answer_names_the_judge(judged: SweepRecord, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["best", str(judged.folder)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# By the judge")]
    assert len(lines) == 2 and all("the best" in line and "(48 prompts)" in line for line in lines)
    assert main(["best", str(judged.folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["judgements"]) == 2


def test_calibration_says_when_trials_are_too_few(judged: SweepRecord, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(judged.folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "By the gold reward: 3 trials are too few" in out and "judge judges.py:gold" in out


def test_whatever_a_judge_dies_of_is_stored_and_ends_no_sweep(judged: SweepRecord, tmp_path: Path) -> None:
    def out_of_memory() -> None:
        raise RuntimeError("CUDA out of memory\nand a long story")

    spec = load_spec(judged.folder / "spec.yaml", overrides=["judge.prompts=40"])  # so completions must be drawn
    ground = Ground(ray.put(out_of_memory), open_worker(spec)[1], {"cpu": 1, "gpu": 0})
    sweep = replace(judged, folder=tmp_path)
    judge_at_end(sweep, spec, ground=ground, stage=lambda name: lambda done, total: None)
    stored = stored_judgements(tmp_path)
    assert {judgement.judge for judgement in stored} == {"gold", "judges.py:gold"}
    for judgement in stored:
        assert judgement.problem == "RuntimeError: CUDA out of memory" and len(judgement.finalists) == 2
        (line,) = judgement_lines(judgement, best=None)
        assert "gave no verdict: RuntimeError: CUDA out of memory; `prefopt judge`" in line


def test_a_sweep_without_a_valid_score_asks_no_judge_and_samples_nothing(judged: SweepRecord, tmp_path: Path) -> None:
    spec = load_spec(judged.folder / "spec.yaml")
    ground = Ground(ray.put(None), open_worker(spec)[1], {"cpu": 1, "gpu": 0})
    nothing = SweepRecord(tmp_path)
    assert judge_at_end(nothing, spec, ground=ground, stage=lambda name: lambda done, total: None) == []
    with pytest.raises(SweepError, match="none can be judged"):
        judge_sweep(nothing, spec, questions(spec)[0], ground=lambda: ground, stage=lambda name: lambda *point: None)
    assert not list(tmp_path.iterdir())


def judge_files(sweep: SweepRecord) -> list[Path]:
    return sorted((sweep.folder / "judge").glob("completions-*.jsonl"))


def completions(sweep: SweepRecord, competitor: str) -> tuple[dict, list[dict]]:
    head, *lines = (sweep.folder / "judge" / f"completions-{competitor}.jsonl").read_text().splitlines()
    return json.loads(head), [json.loads(line) for line in lines]


def rewards(sweep: SweepRecord, competitor: str) -> np.ndarray:
    """By the definition of the gold reward, one completion after the other."""
    return np.array([
        slow_reward(ids(line["prompt"].removesuffix(">")), ids(line["text"]), line["finished"])
        for line in completions(sweep, competitor)[1]
    ])
