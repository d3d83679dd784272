"""What an evaluation measures: the select pairs, a probe of train pairs, and samples of the policy.

`evaluate` runs a list of evaluators over one slot's policy. It changes nothing in the trial: no
training state, no global random stream.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from prefopt_ray.engine.base import REFERENCE, Engine, ReferencedPairs, Samples
from prefopt_ray.losses.cards import LossCard
from prefopt_ray.measures.metrics import gap_metrics, ipo_h_over_target, pair_metrics, select_metrics
from prefopt_ray.pairs.tokens import Ragged
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.scorers import Completion, Scorer
from prefopt_ray.trial import TrialConfig


@dataclass(frozen=True)
class PolicyView:
    """What an evaluator may look at."""

    engine: Engine
    slot: int
    step: int
    config: TrialConfig
    card: LossCard
    log: EvaluationLog  # evaluators of pairs add their log-probs here


class Evaluator(Protocol):
    def metrics(self, view: PolicyView) -> dict[str, float]: ...


def evaluate(evaluators: Sequence[Evaluator], view: PolicyView) -> dict[str, float]:
    """All evaluators' metrics."""
    out: dict[str, float] = {}
    for evaluator in evaluators:
        out.update(evaluator.metrics(view))
    return out


@dataclass(frozen=True)
class PairEvaluator:
    """Scores the select part and a fixed probe of train pairs into the per-pair log: `eval/`, `probe/`, `gap/`."""

    select: ReferencedPairs
    probe: ReferencedPairs

    def metrics(self, view: PolicyView) -> dict[str, float]:
        card, params = view.card, view.config.loss_params
        for name, part in self.parts.items():
            view.log.add(name, view.step, view.engine.score(view.slot, part.tokens))
        select, probe = (view.log.stats(name, view.step) for name in ("select", "probe"))
        on_select = pair_metrics(select, card, params) | select_metrics(
            select, card, params, groups=self.select.tokens.groups
        )
        out = {f"eval/{name}": value for name, value in on_select.items()}
        out |= {f"probe/{name}": value for name, value in pair_metrics(probe, card, params).items()}
        out |= gap_metrics(probe, select, card, params=params)
        if card.name in ("ipo_mean", "ipo_sum"):
            out["ipo/h_over_target"] = ipo_h_over_target(probe, card, params)
        return out

    @property
    def parts(self) -> dict[str, ReferencedPairs]:
        return {"select": self.select, "probe": self.probe}


@dataclass
class SampleEvaluator:
    """Draws one completion per prompt at a fixed seed: divergence from the reference, diversity, scores.

    The reference's own completions of the same prompts are drawn once per setting and kept, to give
    win rates against it (ties count one half).
    """

    prompts: Ragged  # M prompts of the select part
    decode: Callable[[Sequence[int]], str]  # token ids -> text
    scorers: Sequence[Scorer] = ()
    _reference_scores: dict[tuple[int, int, str], np.ndarray] = field(default_factory=dict)

    def metrics(self, view: PolicyView) -> dict[str, float]:
        settings = view.config.evaluation
        if view.step not in settings.sample_steps:
            return {}
        samples = self._draw(view.engine, view.slot, settings.max_new_tokens, seed=settings.sample_seed)
        out = _sample_metrics(samples)
        if not self.scorers:
            return out
        prompts, completions = self._texts(samples)
        for scorer in self.scorers:
            scores = scorer.score(prompts, completions)
            rivals = self._reference(view.engine, scorer, settings.max_new_tokens, seed=settings.sample_seed)
            wins = (scores > rivals) + 0.5 * (scores == rivals)
            out |= {f"{scorer.name}/reward": float(scores.mean()), f"{scorer.name}/win_rate": float(wins.mean())}
        return out

    def _draw(self, engine: Engine, slot: int, max_new_tokens: int, *, seed: int) -> Samples:
        return engine.sample(slot, self.prompts, max_new_tokens=max_new_tokens, seed=seed)

    def _texts(self, samples: Samples) -> tuple[list[str], list[Completion]]:
        prompts = [self.decode(self.prompts[i].tolist()) for i in range(len(self.prompts))]
        drawn = samples.completions
        completions = [
            Completion(self.decode(drawn[i].tolist()), len(drawn[i]), finished=bool(samples.finished[i]))
            for i in range(len(drawn))
        ]
        return prompts, completions

    def _reference(self, engine: Engine, scorer: Scorer, max_new_tokens: int, *, seed: int) -> np.ndarray:
        key = (max_new_tokens, seed, scorer.name)
        if key not in self._reference_scores:
            # Another seed than the policy's: with the same one, step 0 would compare equal completions.
            samples = self._draw(engine, REFERENCE, max_new_tokens, seed=seed + 1_000_003)
            self._reference_scores[key] = scorer.score(*self._texts(samples))
        return self._reference_scores[key]


def _sample_metrics(samples: Samples) -> dict[str, float]:
    positions = max(1, int(samples.positions.sum()))
    drawn = samples.completions
    distinct = {drawn[i].tobytes() for i in range(len(drawn))}
    return {
        "samples/kl": float(samples.kl.mean()),
        "samples/kl_per_token": float(samples.kl.sum() / positions),
        "samples/entropy": float(samples.entropy.sum() / positions),
        "samples/length": float(drawn.lengths.mean()),
        "samples/eos_rate": float(samples.finished.mean()),
        "samples/unique_frac": len(distinct) / max(1, len(drawn)),
    }


def finite_metrics(metrics: Mapping[str, float]) -> tuple[dict[str, float], int]:
    """Metrics without NaN and infinities, and how many there were."""
    kept = {name: value for name, value in metrics.items() if np.isfinite(value)}
    return kept, len(metrics) - len(kept)
