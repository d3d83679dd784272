"""Gold preference pairs: repeatable, prompt-disjoint, and labelled by the true reward with Bradley-Terry noise."""

from pathlib import Path

import numpy as np
import pytest

from prefopt_ray.errors import DataError, SpecError
from prefopt_ray.gold.pairs import SPLITS, gold_rows, with_flipped_labels
from prefopt_ray.gold.scorer import GoldScorer
from prefopt_ray.spec import SweepSpec
from prefopt_ray.train.scorers import Completion

PAIRS = 1000


@pytest.fixture(scope="module")
def rows(gold_base: Path) -> dict[str, list[dict[str, str]]]:
    return {split: gold_rows(gold_base, split=split, pairs=PAIRS) for split in SPLITS}


def rewards(rows: list[dict[str, str]], key: str) -> np.ndarray:
    completions = [Completion(row[key], tokens=len(row[key].split()), finished=True) for row in rows]
    return GoldScorer().score([row["prompt"] for row in rows], completions)


def test_splits_share_no_prompt_even_across_seeds(rows, gold_base: Path):
    prompts = {split: {row["prompt"] for row in rows[split]} for split in SPLITS}
    assert all(len(prompts[split]) == PAIRS for split in SPLITS)
    prompts["train"] |= {row["prompt"] for row in gold_rows(gold_base, split="train", pairs=PAIRS, seed=1)}
    assert not prompts["train"] & prompts["select"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["select"] & prompts["test"]


def test_rows_are_text_of_the_language_and_never_equal_or_empty(rows):
    for row in (row for split in SPLITS for row in rows[split]):
        assert set(row) == {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}
        assert row["chosen"] != row["rejected"]
        assert row["prompt"].split()[-1] == ">" and len(row["prompt"].split()) == 5
        for key in ("chosen", "rejected"):
            assert row[key] and set(row[key]) <= set("abcdefghijklmnop ")


def test_labels_agree_with_the_reward_as_often_as_bradley_terry_says(rows):
    every = [row for split in SPLITS for row in rows[split]]
    difference = rewards(every, "chosen") - rewards(every, "rejected")
    bayes = np.mean(1 / (1 + np.exp(-np.abs(difference))))  # accuracy of the best possible ranker
    assert bayes == pytest.approx(0.768, abs=0.015)
    agreement = np.mean((difference > 0) + 0.5 * (difference == 0))
    assert agreement == pytest.approx(bayes, abs=3 * 0.0077)  # 3 SE at n = 3000
    # The labels' own likelihood equals their entropy when they are drawn from sigma(difference).
    sure = 1 / (1 + np.exp(-difference))
    entropy = np.mean(-sure * np.log(sure) - (1 - sure) * np.log(1 - sure))
    assert np.mean(-np.log(sure)) == pytest.approx(entropy, abs=0.03)


def test_a_row_s_scores_are_its_completions_true_rewards(rows):
    for split in SPLITS:
        for key in ("chosen", "rejected"):
            assert [row[f"{key}_score"] for row in rows[split]] == pytest.approx(rewards(rows[split], key))


def test_base_samples_score_as_the_task_was_calibrated(rows):
    both = np.concatenate([rewards(rows[split], key) for split in SPLITS for key in ("chosen", "rejected")])
    assert both.mean() == pytest.approx(0.95, abs=0.15)
    assert both.std() == pytest.approx(1.4, abs=0.1)


def test_fewer_pairs_are_the_first_of_more_pairs_and_seeds_differ(rows, gold_base: Path):
    assert gold_rows(gold_base, split="train", pairs=300) == rows["train"][:300]
    assert gold_rows(gold_base, split="train", pairs=300, seed=1) != rows["train"][:300]


def test_rows_are_read_back_from_the_cache_and_drawn_the_same_without_it(rows, gold_base: Path):
    (file,) = (gold_base / "rows").glob(f"*-select-{PAIRS}-seed0.json")
    stamp = file.stat().st_mtime_ns
    assert gold_rows(gold_base, split="select", pairs=PAIRS) == rows["select"]
    assert file.stat().st_mtime_ns == stamp
    file.unlink()
    assert gold_rows(gold_base, split="select", pairs=PAIRS) == rows["select"]


@pytest.mark.parametrize(("split", "pairs", "says"), [("dev", 10, "train, select, test"), ("test", 10**6, "14745"),
                                                      ("train", 0, "1 to 29491")])
def test_impossible_requests_name_what_is_possible(gold_base: Path, split: str, pairs: int, says: str):
    with pytest.raises(DataError, match=says):
        gold_rows(gold_base, split=split, pairs=pairs)


def test_flipped_labels_turn_around_exactly_the_share_asked_for(rows):
    flipped = with_flipped_labels(rows["train"], 0.2)
    swap = {"chosen": "rejected", "chosen_score": "rejected_score"}
    swap |= {value: key for key, value in swap.items()}
    turned = [new != old for new, old in zip(flipped, rows["train"])]
    assert sum(turned) == PAIRS // 5
    for new, old, was_turned in zip(flipped, rows["train"], turned):
        assert all(new[key] == old[swap.get(key, key) if was_turned else key] for key in old)
    assert with_flipped_labels(rows["train"], 0.2) == flipped
    # Noise that does not look at the reward: agreement moves from a to a + .2 - .4 a.
    agreement = np.mean([row["chosen_score"] > row["rejected_score"] for row in rows["train"]])
    after = np.mean([row["chosen_score"] > row["rejected_score"] for row in flipped])
    assert after == pytest.approx(agreement + 0.2 - 0.4 * agreement, abs=0.03)


def test_only_gold_train_labels_can_be_flipped(tmp_path: Path):
    written = {
        "name": "noise", "model": {"policy": "gold", "dtype": "float32"}, "training": {"steps": 10},
        "search": {"trials_per_loss": 2, "losses": {"sigmoid": {}}}, "storage": str(tmp_path),
        "data": {"train": {"source": "gold", "pairs": 100, "flipped": 0.2}, "select": {"pairs": 50}},
    }
    assert SweepSpec.from_dict(written).data.train.flipped == 0.2
    for part in ("select", "train"):
        source = {"source": "pairs.jsonl"} if part == "train" else {"pairs": 50}
        with pytest.raises(SpecError, match="gold train pairs"):
            SweepSpec.from_dict({**written, "data": {**written["data"], part: {**source, "flipped": 0.2}}})
