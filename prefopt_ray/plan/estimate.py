"""From a probe to a sweep: seconds of a step, a trial and all trials, where a trial's time goes, how many fit."""

from dataclasses import dataclass

from prefopt_ray.engine.batches import shared_lengths
from prefopt_ray.engine.reference import reference_passes
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.plan.probe import Probe
from prefopt_ray.prepare import Prepared
from prefopt_ray.trial import TrialConfig


@dataclass(frozen=True)
class TrialTime:
    """Seconds of one trial that nobody stops."""

    training: float
    select: float
    probe: float
    samples: float
    checkpoints: float

    @property
    def total(self) -> float:
        return self.training + self.evaluating + self.checkpoints

    @property
    def evaluating(self) -> float:
        return self.select + self.probe + self.samples

    @property
    def evaluating_share(self) -> float:
        return self.evaluating / self.total


@dataclass(frozen=True)
class SweepPlan:
    """What `prefopt plan` tells."""

    name: str
    trials: int
    config: TrialConfig  # the trial that was probed
    rungs: tuple[int, ...]
    pairs: dict[str, int]  # part -> pairs
    probe: Probe
    trial: TrialTime
    slots: int  # trials at once by CPUs, GPUs and the spec
    fitting: int  # trials side by side in the memory of one place
    places: int  # GPUs, or machines without one
    reference_s: float  # the pass before the trials; 0 where it is stored
    warnings: tuple[str, ...]
    judged: bool = False  # a judge is asked inside trials, and was not timed

    @property
    def at_once(self) -> int:
        return max(1, min(self.slots, self.fitting * self.places, self.trials))

    @property
    def sweep_s(self) -> float:
        """Reference pass, opened workers, and every trial to its end."""
        return self.reference_s + self.probe.open_s + self.trial.total * -(-self.trials // self.at_once)


def estimate(
    prepared: Prepared, config: TrialConfig, probe: Probe, *, slots: int, places: int, reference_stored: bool
) -> SweepPlan:
    """What `probe` says of every trial of the prepared spec; `slots` fit at once, on `places` with the probe's memory."""
    spec, data = prepared.spec, prepared.loaded.data
    scored = reference_passes(data, prepared.blueprint.needs)
    every_pair = sum(len(pairs) * _relative_length(prepared, pairs) for pairs in scored.values())
    return SweepPlan(
        name=spec.name, trials=spec.trial_count, config=config,
        rungs=spec.rung_steps(spec.total_steps(len(data.train))),
        pairs={name: len(part) for name, part in data.parts.items()}, probe=probe,
        trial=_trial(prepared, config, probe), slots=slots,
        fitting=probe.room.available // probe.peak, places=places,
        reference_s=0.0 if reference_stored else probe.pair_s * every_pair, warnings=prepared.warnings,
        judged=prepared.blueprint.judge is not None,
    )


def _trial(prepared: Prepared, config: TrialConfig, probe: Probe) -> TrialTime:
    evaluation, data = config.evaluation, prepared.loaded.data
    scorings = sum(1 for step in evaluation.steps if step > 0)  # at step 0 the select part is the reference's
    probed = min(evaluation.probe_pairs, len(data.train)) * _relative_length(prepared, data.train)
    return TrialTime(
        training=probe.step_s * config.training.stop_step,
        select=probe.pair_s * len(data.select) * scorings,
        probe=probe.pair_s * probed * len(evaluation.steps),
        samples=probe.draw_s * len(evaluation.sample_steps),
        checkpoints=probe.save_s * len(evaluation.steps),
    )


def _relative_length(prepared: Prepared, pairs: PairTokens) -> float:
    """How long one of these pairs is beside a select pair."""
    return float(shared_lengths(pairs).mean() / shared_lengths(prepared.loaded.data.select).mean())
