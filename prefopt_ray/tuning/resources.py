"""What a trial may take of a machine or cluster: start Ray, refuse what can never fit, count the slots."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import torch

from prefopt_ray.errors import Problem, ResourceError
from prefopt_ray.spec import SweepSpec


def start_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names, else start a quiet one on this machine; once per process."""
    if ray.is_initialized():
        return
    for name in ("RAY_CHDIR_TO_TRIAL_DIR", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    for logger in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # a trial's traceback goes into its folder
    # On this machine a GPU counts if torch can use it, not if the driver shows one to Ray.
    local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "num_gpus": torch.cuda.device_count()}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)


@contextmanager
def tune_settings() -> Iterator[None]:
    """Tune as a sweep wants it, within: a notebook's own Tune runs afterwards keep their loggers and tables."""
    added = {name: value for name, value in _TUNE_SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # ledger and per-pair files hold everything
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read back
}


def refuse_impossible(spec: SweepSpec) -> None:
    """Before anything is read or started, where trials will run on this machine. Raises ResourceError."""
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        _reservation(spec, cpus=float(os.cpu_count() or 1), gpus=float(torch.cuda.device_count()))


def trial_resources(spec: SweepSpec) -> dict[str, float]:
    """What one trial reserves on the largest node. Raises ResourceError."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return _reservation(
        spec,
        cpus=max((node.get("CPU", 0.0) for node in nodes), default=0.0),
        gpus=max((node.get("GPU", 0.0) for node in nodes), default=0.0),
    )


def _reservation(spec: SweepSpec, *, cpus: float, gpus: float) -> dict[str, float]:
    """What one trial reserves on a node with so much. Raises ResourceError when that can never fit."""
    wanted = {"cpu": float(spec.resources.cpus_per_trial), "gpu": spec.resources.gpu_share(gpus_present=gpus > 0)}
    problems = []
    if wanted["cpu"] > cpus:
        problems.append(Problem(
            "spec", "resources.cpus_per_trial", f"{wanted['cpu']:g}", f"the largest node has {cpus:g} CPUs",
            "ask for fewer CPUs per trial, or connect to a larger cluster with RAY_ADDRESS",
        ))
    if wanted["gpu"] > gpus:
        seen = "" if torch.cuda.is_available() else "; torch sees no GPU here"
        problems.append(Problem(
            "spec", "resources.gpus_per_trial", f"{wanted['gpu']:g}", f"the largest node has {gpus:g} GPUs{seen}",
            "set gpus_per_trial: 0 to run on CPUs, or connect to a cluster with GPUs",
        ))
    if problems:
        raise ResourceError(*problems)
    return wanted


def trials_run_here() -> bool:
    """Whether the machine of this process is the whole cluster."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return alive == [ray.get_runtime_context().get_node_id()]


def slots(resources: dict[str, float], *, limit: int | None) -> int:
    """How many trials fit at once, and at most `limit`."""
    total = ray.cluster_resources()
    fits = [int(total.get(name.upper(), 0.0) / share + 1e-6) for name, share in resources.items() if share > 0]
    return max(1, min([*fits, limit] if limit else fits))
