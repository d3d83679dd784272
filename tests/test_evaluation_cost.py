"""A select part that nobody sized is what a trial can afford, and a person is told where evaluating costs a lot."""

from pathlib import Path

import pytest
from journeys.journey import write_pairs
from tiny import save_chat_model

from prefopt_ray.prepare import Prepared, prepare
from prefopt_ray.spec import SweepSpec


def prepared(home: Path, *, pairs: int, training: dict, **sections: object) -> Prepared:
    spec = {
        "name": "cost", "model": {"policy": str(save_chat_model(home / "model")), "dtype": "float32"},
        "data": {"train": {"source": str(write_pairs(home / "pairs.jsonl", count=pairs))}, "max_tokens": 64},
        "training": training, "search": {"trials_per_loss": 1, "losses": {"sigmoid": {}}},
        "storage": str(home / "results"),
    }
    quiet = lambda name: lambda done, total: None  # noqa: E731
    return prepare(SweepSpec.from_dict(spec | sections), stage=quiet, device="cpu", threads=1)


@pytest.mark.parametrize(
    ("pairs", "training", "select"),
    [
        (4000, {"epochs": 1}, 320),  # 8 % of the source
        (1500, {"epochs": 1}, 256),  # below this the gain is mostly noise
        (600, {"epochs": 1}, 120),  # a fifth of the source is all a default takes
        (2000, {"steps": 100, "batch_pairs": 40}, 320),  # 8 % of the pairs trained on
    ],
)
def test_the_default_select_part_grows_with_the_training(tmp_path: Path, pairs: int, training: dict, select: int):
    made = prepared(tmp_path, pairs=pairs, training=training)
    assert len(made.loaded.data.select) == select
    assert len(made.loaded.data.test) == min(1000, pairs // 5)


def test_costly_evaluations_are_announced_with_what_to_change(tmp_path: Path):
    made = prepared(tmp_path, pairs=300, training={"epochs": 1})
    assert any("evaluating will take about" in warning and "data.select.pairs" in warning for warning in made.warnings)


def test_a_long_training_needs_no_warning(tmp_path: Path):
    made = prepared(tmp_path, pairs=1500, training={"epochs": 9}, samples={"at": "never"})
    assert not any("evaluating" in warning for warning in made.warnings)
