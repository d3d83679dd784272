"""The embedded bandit: an ordinary model folder that is exactly a softmax over three numbers, whatever trains it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gold.bandit_loop import Run, trained
from gold.test_bandit_published import OBSERVED

from prefopt_ray.engine.loading import ModelSource, load_model, load_tokenizer
from prefopt_ray.errors import DataError, SpecError
from prefopt_ray.gold.bandit import COMPARISONS, PARTS, bandit_rows, ensure_bandit
from prefopt_ray.prepare import open_worker
from prefopt_ray.spec import SweepSpec
from prefopt_ray.train import Worker, train
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.trial import TrialConfig

STEPS = 200


def spec(storage: Path, *, comparisons: str = "total_order", **changes: object) -> SweepSpec:
    written = {
        "name": "bandit",
        "model": {"policy": "bandit", "adapter": {"kind": "none"}, "dtype": "float32"},
        "data": {"train": {"source": "bandit", "split": comparisons}, "select": {"pairs": 6}, "test": {"pairs": 6}},
        "training": {"steps": STEPS, "batch_pairs": len(COMPARISONS[comparisons]), "warmup": 0, "max_grad_norm": 0},
        "search": {
            "method": "grid", "losses": {"sigmoid": {}, "ipo_sum": {}},
            "shared": {"beta": 0.5, "learning_rate": 0.01},
        },
        "eval": {"at": [0, 50, "100%"]},
        "samples": {"at": ["100%"], "prompts": 6, "max_new_tokens": 2},
        "resources": {"gpus_per_trial": 0},
        "storage": str(storage),
    }
    return SweepSpec.from_dict(written | changes)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bandit")


def trained_policies(worker: Worker, config: TrialConfig, folder: Path) -> dict[int, list[float]]:
    """Probabilities of a, b, c at each evaluation, from the trial's stored log-probs of the probe pairs."""
    list(train(config, worker, folder=folder))
    log = EvaluationLog.load(folder / "evaluations.safetensors")
    tokens = worker.evaluated_parts["probe"].tokens
    policies = {}
    for step in log.steps("probe"):
        stats, policy = log.stats("probe", step), np.full(3, np.nan)
        for row in range(len(tokens)):
            policy[tokens.chosen[row][0]] = stats.policy_chosen[row].exp()
            policy[tokens.rejected[row][0]] = stats.policy_rejected[row].exp()
        policies[step] = policy.tolist()
    return policies


@pytest.mark.parametrize("comparisons", ["total_order", "never_wins"])
@pytest.mark.parametrize("loss", ["ipo_sum", "sigmoid"])
def test_a_trial_of_the_bandit_trains_the_policy_of_the_tabular_loop(
    storage: Path, tmp_path: Path, loss: str, comparisons: str
):
    sweep = spec(storage, comparisons=comparisons)
    worker, prepared = open_worker(sweep)
    config = prepared.trial_config(loss, {"beta": 0.5, "learning_rate": 0.01})
    policies = trained_policies(worker, config, tmp_path / "trial")
    assert policies[0] == pytest.approx([1 / 3] * 3, abs=1e-6)
    for step, expected in trained([Run(loss, OBSERVED[comparisons], 0.5)], at=[50, STEPS]).items():
        # b wins and loses once in the total order: its first gradient is zero in float64 and 1e-9 in float32, which
        # Adam turns into part of a step. (2e-5 without that.)
        assert policies[step] == pytest.approx(expected[0].tolist(), abs=3e-4 if comparisons == "total_order" else 2e-5)


def test_training_every_weight_trains_three_numbers(storage: Path, tmp_path: Path):
    sweep = spec(storage)
    worker, prepared = open_worker(sweep)
    config = prepared.trial_config("sigmoid", {"beta": 0.5, "learning_rate": 0.01})
    before = load_model(prepared.blueprint.model, device=torch.device("cpu")).lm_head.weight.detach().clone()
    *_, last = train(config, worker)
    worker.engine.export(0, tmp_path / "trained")
    kept = load_model(ModelSource(str(tmp_path / "trained"), dtype="float32"), device=torch.device("cpu"))
    moved = (kept.lm_head.weight != before).nonzero().tolist()
    assert moved == [[0, 0], [1, 0], [2, 0]]
    assert last.metrics["samples/length"] == 1 and last.metrics["samples/eos_rate"] == 1


def test_a_completion_is_one_action_whose_log_prob_is_that_of_the_softmax(tmp_path: Path):
    source = ModelSource(str(ensure_bandit(tmp_path)), dtype="float32")
    model, tokenizer = load_model(source, device=torch.device("cpu")), load_tokenizer(source)
    with torch.no_grad():
        model.lm_head.weight[:3, 0] = torch.tensor([1.0, -2.0, 0.5])
        ids = tokenizer("0 0 0 0 0 7 > c", return_tensors="pt")["input_ids"]
        whole = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        logp = model(input_ids=whole).logits[0].log_softmax(-1)
    assert ids.shape == (1, 9) and tokenizer.decode(ids[0, -1:]) == "c"
    expected = torch.tensor([1.0, -2.0, 0.5]).log_softmax(-1)
    torch.testing.assert_close(logp[7, :3], expected)  # after SEP
    assert logp[8, tokenizer.eos_token_id] == 0.0  # after an action the end is certain


def test_parts_share_no_prompt_and_hold_each_comparison_equally_often():
    rows = {part: bandit_rows("never_wins", part=part, pairs=40) for part in PARTS}
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len(set(prompts)) == 120
    for part in rows.values():
        told = [row["chosen"].strip() + row["rejected"].strip() for row in part]
        assert {pair: told.count(pair) for pair in told} == {"ab": 10, "ba": 10, "ac": 10, "bc": 10}


def test_comparisons_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(DataError, match="total_order, cycle"):
        bandit_rows("D1", part="train")


def test_the_folder_is_written_once(tmp_path: Path):
    first = ensure_bandit(tmp_path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert ensure_bandit(tmp_path) == first and (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == ["bandit"]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"policy": "bandit", "dtype": "float32"}, "three numbers"),
        ("model", {"policy": "gold", "dtype": "float32"}, "gold policy knows no words but its own"),
        ("data", {"train": {"source": "bandit"}}, "split: total_order"),
        ("data", {"train": {"source": "bandit", "split": "chain"}, "select": {"split": "cycle"}}, "not read"),
        ("data", {"train": {"source": "gold", "pairs": 9}}, "bandit policy knows no words but its own"),
    ],
)
def test_a_spec_that_mixes_the_bandit_with_something_else_is_refused(
    tmp_path: Path, section: str, change: dict, message: str
):
    with pytest.raises(SpecError, match=message):
        spec(tmp_path, **{section: change})
