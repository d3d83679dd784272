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
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.measures.metrics import gap_metrics, ipo_h_over_target, pair_metrics, select_metrics
from prefopt_ray.measures.proportions import wilson_interval
from prefopt_ray.measures.verdicts import Scores
from prefopt_ray.pairs.tokens import Ragged
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.train.scorers import Completion, SampleJudge, Scorer
from prefopt_ray.trial import TrialConfig


@dataclass(frozen=True)
class PolicyView:
    """What an evaluator may look at."""

    engine: Engine
    slot: int
    step: int
    config: TrialConfig
    card: LossCard
    log: EvaluationLog  # evaluators add here what was seen, pair by pair and sample by sample
    mean_loss: Callable[[PairStats], float | None]  # None: the loss reads more than log-probs


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
        self._score(view)
        select, probe = (view.log.stats(name, view.step) for name in ("select", "probe"))
        on_select = pair_metrics(select, card, params) | select_metrics(
            select, card, params, groups=self.select.tokens.groups
        )
        out = {f"eval/{name}": value for name, value in on_select.items()}
        out |= {f"probe/{name}": value for name, value in pair_metrics(probe, card, params).items()}
        losses = {"eval/loss": view.mean_loss(select), "probe/loss": view.mean_loss(probe)}
        out |= {name: loss for name, loss in losses.items() if loss is not None}
        out |= gap_metrics(probe, select, card, params=params)
        if card.name in ("ipo_mean", "ipo_sum"):
            out["ipo/h_over_target"] = ipo_h_over_target(probe, card, params)
        return out

    def _score(self, view: PolicyView) -> None:
        """Both parts into the log. A policy that equals the reference on the probe, to the last bit and before its
        first step, is the reference: the select part, which is larger, need not be computed again."""
        probe = view.engine.score(view.slot, self.probe.tokens)
        view.log.add("probe", view.step, probe)
        untouched = view.step == 0 and np.array_equal(probe, self.probe.reference)
        select = self.select.reference if untouched else view.engine.score(view.slot, self.select.tokens)
        view.log.add("select", view.step, select)

    @property
    def parts(self) -> dict[str, ReferencedPairs]:
        return {"select": self.select, "probe": self.probe}


@dataclass(frozen=True)
class _ReferenceSamples:
    """What the reference writes to the same prompts, and what scorers gave it."""

    samples: Samples
    scores: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class SampleEvaluator:
    """Draws one completion per prompt at a fixed seed: divergence from the reference, diversity, scores.

    The reference's own completions of the same prompts are drawn once per setting and kept: for win rates
    against it (ties count one half), and because what is few or many for a task is what the reference does.
    """

    prompts: Ragged  # M prompts of the select part
    decode: Callable[[Sequence[int]], str]  # token ids -> text
    scorers: Sequence[Scorer] = ()
    judges: Sequence[SampleJudge] = ()
    _references: dict[tuple[int, int], _ReferenceSamples] = field(default_factory=dict)

    def metrics(self, view: PolicyView) -> dict[str, float]:
        settings = view.config.evaluation
        if view.step not in settings.sample_steps:
            return {}
        samples = self._draw(view.engine, view.slot, settings.max_new_tokens, seed=settings.sample_seed)
        usual = self._reference(view.engine, settings.max_new_tokens, seed=settings.sample_seed)
        _keep(samples, usual.samples, view)
        out = sample_metrics(samples)
        for scorer in self.scorers:
            out |= self._scored(scorer, samples, usual, view=view)
        for judge in self.judges:
            out |= self._judged(judge, samples, usual, view=view)
        return out

    def _scored(
        self, scorer: Scorer, samples: Samples, usual: _ReferenceSamples, *, view: PolicyView
    ) -> dict[str, float]:
        if scorer.name not in usual.scores:
            usual.scores[scorer.name] = scorer.score(*self._texts(usual.samples))
        scores = Scores(scorer.score(*self._texts(samples)), usual.scores[scorer.name])
        view.log.put(f"samples/{scorer.name}/policy/{view.step:08d}", scores.policy)
        view.log.put(f"samples/{scorer.name}/reference", scores.reference)
        low, _ = wilson_interval(float(scores.wins.sum()), len(scores.wins))
        return {
            f"{scorer.name}/reward": float(scores.policy.mean()), f"{scorer.name}/win_rate": float(scores.wins.mean()),
            f"{scorer.name}/win_lcb": low,
        }

    def _judged(
        self, judge: SampleJudge, samples: Samples, usual: _ReferenceSamples, *, view: PolicyView
    ) -> dict[str, float]:
        """The win rate and its lower 95 % bound over the prompts with a verdict; neither where there is none."""
        outcomes = judge.outcomes(self._texts(samples)[1], self._texts(usual.samples)[1])
        decided = outcomes[~np.isnan(outcomes)]
        out = {f"{judge.name}/unjudged": float(len(outcomes) - len(decided))}
        if not len(decided):
            return out
        # As scores against one half, so that rules read it like a scorer's; what has no verdict is a tie to them,
        # since they compare evaluations prompt by prompt.
        view.log.put(f"samples/{judge.name}/policy/{view.step:08d}", np.nan_to_num(outcomes, nan=0.5))
        view.log.put(f"samples/{judge.name}/reference", np.full(len(outcomes), 0.5))
        low, _ = wilson_interval(float(decided.sum()), len(decided))
        return out | {f"{judge.name}/win_rate": float(decided.mean()), f"{judge.name}/win_lcb": low}

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

    def _reference(self, engine: Engine, max_new_tokens: int, *, seed: int) -> _ReferenceSamples:
        key = (max_new_tokens, seed)
        if key not in self._references:
            # Another seed than the policy's: with the same one, step 0 would compare equal completions.
            samples = self._draw(engine, REFERENCE, max_new_tokens, seed=seed + 1_000_003)
            self._references[key] = _ReferenceSamples(samples)
        return self._references[key]


def sample_metrics(samples: Samples) -> dict[str, float]:
    """Length, end, diversity and divergence of one completion per prompt.

    `kl` is the mean over completions of the sum over positions of KL(pi || ref), nats. `distinct_2`: distinct over
    all pairs of neighbouring tokens, of all completions together (Li et al. 2016, arXiv:1510.03055).
    `repetition`: share of a completion's 4-grams that it has had before, mean over completions (seq-rep-4 of
    Welleck et al. 2020, arXiv:1908.04319); a completion of less than four tokens repeats nothing.
    """
    positions = max(1, int(samples.positions.sum()))
    drawn = [samples.completions[i].tolist() for i in range(len(samples.completions))]
    pairs = [pair for tokens in drawn for pair in _ngrams(tokens, 2)]
    return {
        "samples/kl": float(samples.kl.mean()),
        "samples/kl_per_token": float(samples.kl.sum() / positions),
        "samples/entropy": float(samples.entropy.sum() / positions),
        "samples/length": float(samples.completions.lengths.mean()),
        "samples/eos_rate": float(samples.finished.mean()),
        "samples/unique_frac": _unique_frac(samples),
        "samples/distinct_2": len(set(pairs)) / len(pairs) if pairs else 1.0,
        "samples/repetition": float(np.mean([_repetition(_ngrams(tokens, 4)) for tokens in drawn])),
    }


def _keep(samples: Samples, usual: Samples, view: PolicyView) -> None:
    """What the rules read of samples, into the log."""
    at = f"{view.step:08d}"
    view.log.put(f"samples/kl/{at}", samples.kl)
    view.log.put(f"samples/positions/{at}", samples.positions)
    for name, drawn in ((at, samples), ("reference", usual)):
        view.log.put(f"samples/finished/{name}", drawn.finished)
        view.log.put(f"samples/unique_frac/{name}", _unique_frac(drawn))


def _unique_frac(samples: Samples) -> float:
    drawn = samples.completions
    return len({drawn[i].tobytes() for i in range(len(drawn))}) / max(1, len(drawn))


def _ngrams(tokens: list[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(n))))


def _repetition(ngrams: list[tuple[int, ...]]) -> float:
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def finite_metrics(metrics: Mapping[str, float]) -> tuple[dict[str, float], int]:
    """Metrics without NaN and infinities, and how many there were."""
    kept = {name: value for name, value in metrics.items() if np.isfinite(value)}
    return kept, len(metrics) - len(kept)
