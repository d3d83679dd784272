"""One preference pair and a small language model trained through the engine: where DPO and IPO lead, and how fast.

Full fine-tuning with Adam, no clipping, ten tokens per completion: what a first tutorial does, in numbers.
"""

from dataclasses import replace

import numpy as np
import pytest
from tiny import referenced, tiny_engine, tiny_llama, trial_config

from prefopt_ray.pairs.tokens import PairTokens, Ragged, SweepData
from prefopt_ray.train import Worker, make_worker, train
from prefopt_ray.trial import EndState, OptimizerConfig, Report, unpack_points

BETAS = (0.05, 0.1, 0.5, 1.0)
STEPS = {"sigmoid": 60, "ipo_sum": 160}


def one_pair(seed: int) -> PairTokens:
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = (Ragged.from_lists([rng.integers(3, 64, size).tolist()]) for size in (6, 10, 10))
    return PairTokens(np.array([seed]), np.array([seed]), prompt, chosen, rejected)


@pytest.fixture(scope="module")
def worker() -> Worker:
    engine = tiny_engine(tiny_llama(layers=1, hidden=64))
    data = SweepData(train=one_pair(0), select=one_pair(1), test=one_pair(2), pad_id=0, eos_ids=(2,), digest="one")
    return make_worker(engine, referenced(engine, data), decode=str, probe_pairs=1, sample_prompts=1)


def course(
    worker: Worker, loss: str, beta: float, *,
    learning_rate: float = 1e-4, steps: int | None = None, kind: str = "adamw",
) -> tuple[list[dict[str, float]], Report]:
    """The pair's training metrics before each step, and the last report."""
    steps = steps or STEPS[loss]
    config = trial_config(
        loss, params={"beta": beta}, adapter="none", steps=steps, learning_rate=learning_rate, max_grad_norm=0.0,
        optimizer=OptimizerConfig(kind=kind),
    )
    config = replace(config, evaluation=replace(config.evaluation, steps=(0, steps), sample_steps=()))
    reports = list(train(config, worker))
    return [dict(point.metrics) for report in reports for point in unpack_points(report.points)], reports[-1]


@pytest.fixture(scope="module")
def dpo(worker: Worker) -> dict[float, list[dict[str, float]]]:
    return {beta: course(worker, "sigmoid", beta)[0] for beta in BETAS}


def test_dpo_lowers_the_rejected_completion_at_every_step_for_every_beta(dpo: dict):
    for beta in BETAS:
        logps = [metrics["train/logps/rejected"] for metrics in dpo[beta]]
        assert all(later < earlier for earlier, later in zip(logps, logps[1:]))
    ends = [dpo[beta][-1]["train/logps/rejected"] for beta in BETAS]
    assert ends == sorted(ends) and ends[0] < ends[-1] - 5  # the smaller beta, the further


def test_adams_first_steps_do_not_depend_on_beta(dpo: dict):
    early = [dpo[beta][10]["train/h/mean"] for beta in BETAS if beta <= 0.5]
    late = [dpo[beta][-1]["train/h/mean"] for beta in BETAS if beta <= 0.5]
    assert max(early) / min(early) < 1.1
    assert max(late) / min(late) > 2


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_stops_at_half_the_inverse_of_beta(worker: Worker, beta: float):
    _, last = course(worker, "ipo_sum", beta)
    assert last.metrics["probe/h/mean"] == pytest.approx(1 / (2 * beta), abs=0.01)


def test_under_sgd_the_learning_rates_that_break_ipo_do_not_break_dpo(worker: Worker):
    ends = {
        (loss, rate): course(worker, loss, 0.1, learning_rate=rate, steps=30, kind="sgd")[1].end_state
        for loss in ("ipo_sum", "sigmoid") for rate in (1e-4, 1.0)
    }
    assert ends == {
        ("ipo_sum", 1e-4): EndState.COMPLETED, ("ipo_sum", 1.0): EndState.DIVERGED,
        ("sigmoid", 1e-4): EndState.COMPLETED, ("sigmoid", 1.0): EndState.COMPLETED,
    }


def test_under_adam_ipo_bears_learning_rates_a_hundred_times_apart(worker: Worker):
    for rate in (1e-3, 1e-2):
        _, last = course(worker, "ipo_sum", 0.1, learning_rate=rate, steps=160)
        assert last.end_state == EndState.COMPLETED
        assert last.metrics["probe/h/mean"] == pytest.approx(5.0, abs=0.05)
