"""`plan_sweep`: the probe of a trial, run as a Ray task in a process like a trial's, and what follows from it.

A worker's own share of memory (Python, Ray, libraries) is part of a trial's, so the probe is measured in one.
"""

from collections.abc import Callable
from dataclasses import replace

import ray

from prefopt_ray.engine.reference import Progress
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
from prefopt_ray.tuning.trainable import PreferenceTrainable


def plan_sweep(spec: SweepSpec, *, stage: Callable[[str], Progress]) -> SweepPlan:
    """Measure one trial of the spec and tell what all of them will take. Nothing is kept but the prepared pairs.

    Raises ModelError, DataError, ResourceError.
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
    task = _probe_task.options(num_cpus=reserved["cpu"], num_gpus=reserved["gpu"])
    measured = task_value(task.remote(prepared.blueprint, data, config))
    progress(1, 1)
    stored = prepared.blueprint.stored_reference(data, cache=cache_folder(spec) / "reference")
    return estimate(
        prepared, config, measured, slots=slots(reserved, limit=spec.resources.max_concurrent),
        places=_places(reserved), reference_stored=stored is not None,
    )


def dearest_config(prepared: Prepared) -> TrialConfig:
    """A trial of the loss that computes most: what it needs beside log-probs, and whether it sees the whole batch."""
    spec = prepared.spec
    baseline, values = spec.baseline_values()

    def cost(loss: str) -> tuple[int, bool]:
        card = find_card(loss)
        return len(card.needs - {"reference", "lengths"}), card.scope == "batch"

    dearest = max([baseline, *spec.loss_spaces()], key=cost)
    if dearest != baseline:
        values = {**find_card(dearest).defaults, LEARNING_RATE: values[LEARNING_RATE]}
    return prepared.trial_config(dearest, values)


def _places(reserved: Reserved) -> int:
    """GPUs of the cluster, or its machines where trials take none: each has the memory that the probe saw."""
    if reserved["gpu"] > 0:
        return max(1, int(ray.cluster_resources().get("GPU", 0)))
    return max(1, sum(1 for node in ray.nodes() if node["Alive"]))


# A process of its own, and one that has imported what a trial's has.
@ray.remote(max_calls=1, max_retries=0)
def _probe_task(blueprint: WorkerBlueprint, data: SweepData, config: TrialConfig) -> Probe:
    assert PreferenceTrainable
    return probe(blueprint, data, config)
