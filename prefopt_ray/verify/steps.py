"""`verify_steps`: the baseline's first steps through every engine that serves the model, and TRL; and the verdict."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from prefopt_ray.engine.choose import FLAT, PLAIN, ROWS, EngineChoice
from prefopt_ray.engine.reference import Progress
from prefopt_ray.prepare import Prepared, prepare_here
from prefopt_ray.spec import SweepSpec
from prefopt_ray.trial import TrialConfig
from prefopt_ray.verify.arms import Arm, engine_arm
from prefopt_ray.verify.differences import (
    FLOAT32,
    MARGIN_AT_START,
    Comparison,
    Limit,
    compare,
    compare_all,
    measured_limits,
)
from prefopt_ray.verify.trl_arm import TRL, obstacle, trl_arm

SINGLE = "plain, one pair a pass"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verification:
    """What was computed and how far it lies apart."""

    config: TrialConfig
    device: str
    dtype: str
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    limits: dict[str, Limit]
    spread: Comparison | None  # half precision: the plain engine against itself
    left_out: dict[str, str]  # arm -> why it was not computed

    @property
    def margins_within(self) -> bool:
        """Whether every engine starts at the reference, as far as the precision goes."""
        limit = MARGIN_AT_START if self.spread else FLOAT32["logps"].absolute
        return all(arm.margin_at_start <= limit for arm in self.arms if arm.margin_at_start is not None)

    @property
    def complete(self) -> bool:
        """Whether every arm made every step."""
        return all(len(arm.steps) == self.config.training.stop_step for arm in self.arms)

    @property
    def agree(self) -> bool:
        return self.complete and self.margins_within and all(comparison.within for comparison in self.comparisons)


def verify_steps(spec: SweepSpec, *, steps: int, stage: Callable[[str], Progress]) -> Verification:
    """Train the spec's baseline for `steps` steps by every arm. Raises ModelError and DataError.

    Its own model, pairs, data order and adapter start; the learning rate is constant without a warm-up, so that the
    first steps already move the weights.
    """
    prepared = prepare_here(spec, stage=stage)
    config = verified_config(prepared, steps)
    halved = prepared.blueprint.model.dtype != "float32"
    count = 4 if halved else 3  # arms: two of ours, plain against itself, TRL
    progress = stage("engines")
    arms, left_out = _our_arms(prepared, config, done=lambda arm: progress(arm, count))
    spread = None
    if halved:
        plain = next(arm for arm in arms if arm.name == PLAIN)
        single = replace(config, training=replace(config.training, micro_batch_pairs=1))
        spread = compare(plain, engine_arm(SINGLE, _asked(PLAIN), prepared, single), FLOAT32)
        progress(3, count)
    reason = obstacle(config)
    if not reason:
        try:
            arms.append(trl_arm(prepared, config))
        except Exception as error:  # noqa: BLE001 - whatever TRL dies of, our engines' comparison stands
            log.info("TRL failed", exc_info=True)
            reason = f"it failed with {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if reason:
        left_out[TRL] = reason
    progress(count, count)
    limits = measured_limits(spread, dtype=prepared.blueprint.model.dtype) if spread else FLOAT32
    return Verification(
        config, prepared.blueprint.device, prepared.blueprint.model.dtype, tuple(arms), compare_all(arms, limits),
        limits, spread, left_out,
    )


def verified_config(prepared: Prepared, steps: int) -> TrialConfig:
    """The baseline's first `steps` steps."""
    config = prepared.trial_config(*prepared.spec.baseline_values())
    training = replace(config.training, total_steps=steps, stop_step=steps, schedule="constant", warmup_steps=0)
    return replace(
        config, training=training, evaluation=replace(config.evaluation, steps=(0, steps), sample_steps=())
    )


def _our_arms(
    prepared: Prepared, config: TrialConfig, *, done: Callable[[int], None]
) -> tuple[list[Arm], dict[str, str]]:
    """Flat and plain; where the model is not served flat, plain and one row for each completion."""
    done(0)
    arms, left_out = [], {}
    choice = prepared.blueprint.choice
    if choice.engine == FLAT:
        arm = engine_arm(FLAT, choice, prepared, config)
        if arm.plan.engine == FLAT:
            arms.append(arm)
        else:  # the loaded model turned out not to take flat batches
            choice = EngineChoice(PLAIN, arm.plan.reason)
    done(1)
    arms.append(engine_arm(PLAIN, _asked(PLAIN), prepared, config))
    if choice.engine != FLAT:
        left_out[FLAT] = choice.reason
        arms.append(engine_arm(ROWS, _asked(ROWS), prepared, config))
    done(2)
    return arms, left_out


def _asked(engine: str) -> EngineChoice:
    return EngineChoice(engine, "verify asks for it")
