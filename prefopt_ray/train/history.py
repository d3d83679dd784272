"""A trial's history as verdicts read it, from its stored evaluations: while it runs, and from its folder afterwards.

The same function builds both, so a verdict made again from a finished sweep is the one that was recorded.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from prefopt_ray.losses.cards import LossCard, find_card
from prefopt_ray.measures.metrics import collapsed_rejected, margins
from prefopt_ray.measures.verdicts import (
    ChosenRecord,
    EvaluationRecord,
    SampleRecord,
    Scores,
    Thresholds,
    TrialHistory,
)
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.trial import TrialConfig

EVALUATIONS_FILE = "evaluations.safetensors"


def read_history(folder: Path, config: TrialConfig) -> TrialHistory:
    """The history of the trial in `folder`, up to its end. Raises CheckpointError when it has stored nothing.

    `judge(history.until(step), trial_thresholds(thresholds, config))` is the verdict reported at `step`.
    """
    return history_of(EvaluationLog.load(folder / EVALUATIONS_FILE), config)


def history_of(log: EvaluationLog, config: TrialConfig) -> TrialHistory:
    """What a log holds, as a history that may be appended to."""
    card, training = find_card(config.loss), config.training
    train_pairs = log.number("trial/train_pairs")
    return TrialHistory(
        loss=card.name,
        warmup_steps=training.warmup_steps,
        steps=log.step_records(),
        evaluations=[evaluation_record(log, step, card) for step in log.steps("select")],
        beta=config.loss_params.get("beta") if card.bradley_terry else None,
        budget_steps=training.stop_step,
        steps_per_epoch=train_pairs / training.batch_pairs if train_pairs else None,
        vocabulary=log.number("trial/vocabulary"),
    )


def trial_thresholds(thresholds: Thresholds, config: TrialConfig) -> Thresholds:
    """A sweep's thresholds with the trial's own drift limit, which depends on its task."""
    return replace(thresholds, drift_limit_per_token=config.guards.drift_limit_per_token)


def evaluation_record(log: EvaluationLog, step: int, card: LossCard) -> EvaluationRecord:
    """One evaluation of a log that holds the parts `select` and `probe`."""
    select, probe = log.stats("select", step), log.stats("probe", step)
    return EvaluationRecord(
        step=step,
        select_margins=margins(select, card),
        groups=log.groups("select"),
        probe_margins=margins(probe, card),
        probe_collapsed_frac=float(collapsed_rejected(probe).mean()),
        probe_loss_norm=log.number(f"probe/loss_norm/{step:08d}"),
        chosen=_chosen_record(log, step),
        samples=_sample_record(log, step),
        pair_drift_per_token=_pair_drift(log, step),
    )


def _pair_drift(log: EvaluationLog, step: int) -> float:
    """Nats per token; without samples the only sign of how far the policy went, though not a divergence."""
    policy, reference = (log.get(name).astype(np.float64) for name in (f"select/policy/{step:08d}", "select/reference"))
    return float(np.abs((policy - reference) / log.get("select/tokens")).mean())


def _chosen_record(log: EvaluationLog, step: int) -> ChosenRecord:
    policy, reference = (log.get(name).astype(np.float64) for name in (f"select/policy/{step:08d}", "select/reference"))
    tokens = log.get("select/tokens")  # (N, 2), chosen and rejected like the others
    with np.errstate(invalid="ignore"):  # of a diverged trial, which is measured once more before it ends
        leak = np.logaddexp(*reference.T) - np.logaddexp(*policy.T)  # (N,)
    return ChosenRecord(
        drift=policy[:, 0] - reference[:, 0],
        drift_per_token=float(((policy - reference) / tokens)[:, 0].mean()),
        leak_per_token=float((leak / tokens.mean(axis=1)).mean()),
        logp_per_token=float((policy / tokens)[:, 0].mean()),
        reference_logp_per_token=float((reference / tokens)[:, 0].mean()),
    )


def _sample_record(log: EvaluationLog, step: int) -> SampleRecord | None:
    kl = log.get(f"samples/kl/{step:08d}")
    if kl is None:
        return None
    finished, usual = (log.get(f"samples/finished/{which}") for which in (f"{step:08d}", "reference"))
    return SampleRecord(
        count=len(kl),
        kl=float(kl.mean()),
        kl_per_token=float(kl.sum() / max(1, log.get(f"samples/positions/{step:08d}").sum())),
        unique_frac=log.number(f"samples/unique_frac/{step:08d}"),
        eos_rate=float(finished.mean()),
        reference_unique_frac=log.number("samples/unique_frac/reference"),
        reference_eos_rate=float(usual.mean()),
        scores=_scores(log, step),
    )


def _scores(log: EvaluationLog, step: int) -> dict[str, Scores]:
    policy = {name.split("/")[1]: log.get(name) for name in log.names() if name.endswith(f"/policy/{step:08d}")
              and name.startswith("samples/")}
    return {scorer: Scores(given, log.get(f"samples/{scorer}/reference")) for scorer, given in policy.items()}
