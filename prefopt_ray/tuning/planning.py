"""`plan_sweep`: the probe of a trial, run as a Ray task in a process like a trial's, and what follows from it.

A worker's own share of memory (Python, Ray, libraries) is part of a trial's, so the probe is measured in one.
"""

from collections.abc import Callable
from dataclasses import replace

import ray
import torch

from prefopt_ray.engine.reference import Progress
from prefopt_ray.errors import Problem, ResourceError
from prefopt_ray.losses.cards import find_card
from prefopt_ray.pairs.tokens import SweepData
from prefopt_ray.plan.estimate import SweepPlan, estimate
from prefopt_ray.plan.probe import Probe, probe
from prefopt_ray.prepare import Prepared, WorkerBlueprint, cache_folder, prepare
from prefopt_ray.spec import SweepSpec
from prefopt_ray.spec.space import LEARNING_RATE
from prefopt_ray.trial import TrialConfig
from prefopt_ray.tuning.passes import Reserved, task_value
from prefopt_ray.tuning.resources import refuse_impossible, slots, start_ray, trial_resources
from prefopt_ray.tuning.trainable import PreferenceTrainable  # noqa: F401 - its imports are part of a trial's memory


def plan_sweep(spec: SweepSpec, *, stage: Callable[[str], Progress]) -> SweepPlan:
    """Measure one trial of the spec and tell what all of them will take. Nothing is kept but the prepared pairs.

    Raises ModelError and DataError; ResourceError where not even one trial fits.
    """
    refuse_impossible(spec)
    prepared = prepare(spec, stage=stage, device="cpu", threads=spec.resources.cpus_per_trial)
    config = dearest_config(prepared)
    start_ray()
    reserved = trial_resources(spec)
    prepared = replace(
        prepared, blueprint=replace(prepared.blueprint, device="cuda" if reserved["gpu"] > 0 else "cpu")
    )
    progress = stage("a trial's probe")
    progress(0, 1)
    data = prepared.loaded.data
    measured = _measured(prepared.blueprint, data, config, reserved=reserved)
    progress(1, 1)
    missing = prepared.blueprint.missing_reference(data, cache=cache_folder(spec) / "reference")
    return estimate(
        prepared, config, measured, slots=slots(reserved, limit=spec.resources.max_concurrent),
        places=_places(reserved), reference_stored=not missing,
    )


def _measured(blueprint: WorkerBlueprint, data: SweepData, config: TrialConfig, *, reserved: Reserved) -> Probe:
    """The probe's result. Raises ResourceError where not even one trial fits."""
    task = _probe_task.options(num_cpus=reserved["cpu"], num_gpus=reserved["gpu"])
    try:
        return task_value(task.remote(blueprint, data, config))
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, torch.OutOfMemoryError):
            raise
        shortage = str(error.cause).strip().partition("\n")[0]
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        shortage = f"the probe's process was ended ({type(error).__name__})"
    raise ResourceError(Problem(
        "spec", "model.policy", shortage, "one trial does not fit in the memory that is free",
        "lower data.max_tokens, set training.micro_batch_pairs: 1 or training.gradient_checkpointing: true, or "
        "take model.adapter.kind: qlora",
    ))


# Of a loss's needs: how many forward passes, about, they add to a step. Others come with the data or the reference.
_ADDED_PASSES = {"mismatched": 1.0, "distribution": 1.5, "token_sq": 0.3}
_WHOLE_BATCH = 1.0  # a batch-wide loss makes every forward pass twice, the first without a gradient


def added_passes(loss: str) -> float:
    """About how many forward passes a step of the loss makes beside sigmoid's one."""
    card = find_card(loss)
    return sum(_ADDED_PASSES.get(need, 0.0) for need in card.needs) + _WHOLE_BATCH * (card.scope == "batch")


def dearest_config(prepared: Prepared) -> TrialConfig:
    """A trial of the loss that computes most."""
    spec = prepared.spec
    baseline, values = spec.baseline_values()
    dearest = max([baseline, *spec.loss_spaces()], key=added_passes)
    if dearest != baseline:
        values = {**find_card(dearest).defaults, LEARNING_RATE: values[LEARNING_RATE]}
    return prepared.trial_config(dearest, values)


def _places(reserved: Reserved) -> int:
    """GPUs of the cluster, or its machines where trials take none: each has the memory that the probe saw."""
    if reserved["gpu"] > 0:
        return max(1, int(ray.cluster_resources().get("GPU", 0)))
    return max(1, sum(1 for node in ray.nodes() if node["Alive"]))


@ray.remote(max_calls=1, max_retries=0)  # a process of its own
def _probe_task(blueprint: WorkerBlueprint, data: SweepData, config: TrialConfig) -> Probe:
    return probe(blueprint, data, config)
