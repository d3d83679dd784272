"""A sweep folder with chosen per-pair numbers, written by the package's own writers: no training."""

from pathlib import Path

import numpy as np
from tiny import random_pairs, trial_config

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.results.ledger import Ledger, SweepRecord, read_sweep
from prefopt_ray.measures.gain import calibrated_gain
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.trial import EndState, Report, Verdict

STEP = 4
VERDICT = Verdict("healthy")


def margins(strength: float, *, pairs: int, seed: int) -> np.ndarray:
    """(N,) margins of a policy that is right more often the larger `strength`.

    Half of the noise is the pairs' own (shared by a seed, as all policies find the same pairs hard).
    """
    common = np.random.default_rng(seed).normal(size=pairs)
    if not np.isfinite(strength):
        return np.full(pairs, strength)
    own = np.random.default_rng([seed, round(strength * 1e6)]).normal(size=pairs)
    return strength + (common + own) / np.sqrt(2)


def write_sweep(
    folder: Path, strengths: dict[str, float | tuple[float, float]], *, pairs: int = 400, tested: bool = True, end: EndState = EndState.COMPLETED
) -> SweepRecord:
    """One trial per entry (the first is the baseline), margins of the given strength on select and test (or of two)."""
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("sweep", format=1, sweep_id="cafe", name="made", spec_hash="0", facts={"pairs": {}})
    for number, (name, strength) in enumerate(strengths.items()):
        config = trial_config(params={"beta": 0.1 + number / 100})
        values = {"beta": config.loss_params["beta"], "learning_rate": config.learning_rate}
        ledger.append("trial", trial=name, number=number, values=values, baseline=number == 0, config=config.to_dict())
        home = folder / "trials" / name
        home.mkdir(parents=True)
        gain = -1.0
        for part, file in (("select", "evaluations"), ("test", "test")):
            seed = {"select": 1, "test": 2}[part]
            on_part = strength if isinstance(strength, float) else strength[part == "test"]
            h = margins(on_part, pairs=pairs, seed=seed).astype(np.float32)
            stored = EvaluationLog.of_parts({part: _part(pairs, seed)})
            stored.add(part, STEP, np.stack([h, np.zeros_like(h)], axis=1))
            stored.save(home / f"{file}.safetensors")
            gain = calibrated_gain(h, None).gain if part == "select" else gain
        ledger.append("report", trial=name, report=report(gain).to_dict())
        ledger.append("end", trial=name, end_state=end, reason="made up")
        if tested:
            ledger.append("tested", trial=name, step=STEP)
    ledger.close()
    return read_sweep(folder)


def report(gain: float, *, step: int = STEP) -> Report:
    metrics = {
        "eval/gain": gain, "eval/gain_sum": gain, "eval/gain_per_token": gain, "eval/rewards/accuracy": 0.6,
        "eval/drift/chosen/per_token": 0.1, "eval/drift/rejected/per_token": -0.3,
    }
    best_step = step if gain >= 0 else -1
    return Report(step, 8 * step, metrics, gain, gain, best_step, VERDICT, VERDICT)


def _part(pairs: int, seed: int) -> ReferencedPairs:
    return ReferencedPairs(random_pairs(pairs, seed=seed), np.zeros((pairs, 2), dtype=np.float32))
