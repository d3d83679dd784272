"""Learning-rate factors against their closed forms, and the order in which pairs are seen."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.train.schedule import batch_indices, rate_factor
from prefopt_ray.trial import TrainingConfig


def factors(schedule: str, *, total: int = 10, warmup: int = 0, stop: int | None = None) -> list[float]:
    training = TrainingConfig(total_steps=total, stop_step=stop or total, schedule=schedule, warmup_steps=warmup)
    return [rate_factor(training, step) for step in range(total)]


def test_constant_is_one_after_the_warm_up() -> None:
    assert factors("constant", warmup=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])


def test_linear_falls_evenly_and_its_last_step_still_moves() -> None:
    assert factors("linear") == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_cosine_is_half_way_in_the_middle() -> None:
    values = factors("cosine", total=8)
    assert values == pytest.approx([math.cos(math.pi * step / 16) ** 2 for step in range(8)])
    assert values[4] == pytest.approx(0.5)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]), total=st.integers(1, 200), data=st.data()
)
def test_factors_rise_to_one_and_never_leave_zero_to_one(schedule: str, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    values = factors(schedule, total=total, warmup=warmup)
    assert all(0 < value <= 1 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if warmup < total:
        assert values[warmup] == 1


def test_decay_runs_over_the_whole_length_wherever_training_stops() -> None:
    assert factors("linear", stop=3) == factors("linear")


@given(pairs=st.integers(1, 50), batch=st.integers(1, 70), seed=st.integers(0, 5))
def test_every_epoch_sees_every_pair_once(pairs: int, batch: int, seed: int) -> None:
    steps = 3 * pairs // batch + 1
    seen = np.concatenate([batch_indices(step, pairs=pairs, batch=batch, seed=seed) for step in range(steps)])
    assert len(seen) == steps * batch
    for start in range(0, len(seen) - pairs + 1, pairs):
        assert Counter(seen[start : start + pairs].tolist()) == Counter(range(pairs))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    def epoch(number: int, seed: int, batch: int = 8) -> list[int]:
        steps = range(number * 32 // batch, (number + 1) * 32 // batch)
        return np.concatenate([batch_indices(s, pairs=32, batch=batch, seed=seed) for s in steps]).tolist()

    assert epoch(0, 1) == epoch(0, 1) == epoch(0, 1, batch=4) == epoch(0, 1, batch=32)
    assert len({tuple(epoch(number, seed)) for number in range(3) for seed in range(3)}) == 9
