"""What a trial may take of a machine or cluster: start Ray, refuse what can never fit, count the slots."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import torch
from ray._private.state import state

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


@dataclass(frozen=True)
class NodeKind:
    """Machines that are alike: what each has, and how many of them there are or can be."""

    resources: Mapping[str, float]  # CPU, GPU, ...
    count: int

    def fits(self, share: Mapping[str, float]) -> int:
        """Trials on one machine that each take `share` (cpu, gpu)."""
        held = (int(self.resources.get(name.upper(), 0.0) / part + 1e-6) for name, part in share.items() if part > 0)
        return min(held)


def node_kinds() -> list[NodeKind]:
    """The machines of the cluster, and those that its autoscaler may add."""
    return [*_alive(), *_addable()]


def _alive() -> list[NodeKind]:
    return [NodeKind(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]


def _addable() -> list[NodeKind]:
    """What the autoscaler has told Ray that it may start; nothing without one."""
    config = state.get_cluster_config()  # private: Ray's own libraries size themselves by it, and nothing else tells it
    groups = config.node_group_configs if config is not None else ()
    return [NodeKind(dict(group.resources), group.max_count) for group in groups if group.max_count > 0]


def trial_resources(spec: SweepSpec) -> dict[str, float]:
    """What one trial reserves on the largest machine that there is or can be. Raises ResourceError."""
    kinds = node_kinds()
    wanted = _reservation(
        spec,
        cpus=max((kind.resources.get("CPU", 0.0) for kind in kinds), default=0.0),
        gpus=max((kind.resources.get("GPU", 0.0) for kind in kinds), default=0.0),
    )
    if not any(kind.fits(wanted) for kind in kinds):
        shown = ", ".join(sorted({_shown(kind) for kind in kinds}))
        raise ResourceError(Problem(
            "spec", "resources", f"{wanted['cpu']:g} CPUs and {wanted['gpu']:g} GPUs for a trial",
            f"no machine has both (they have {shown})", "ask for less per trial, or add such a machine",
        ))
    return wanted


def _shown(kind: NodeKind) -> str:
    return " and ".join(f"{kind.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))


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
    """Whether the machine of this process is the whole cluster, and stays it."""
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return alive == [ray.get_runtime_context().get_node_id()] and not _addable()


def slots(resources: dict[str, float], *, limit: int | None) -> int:
    """How many trials fit at once on all machines that there are or can be, and at most `limit`.

    Machines that are alive may be among those that the autoscaler may add: what it may add counts where it is more.
    """
    fit = max(sum(kind.count * kind.fits(resources) for kind in kinds) for kinds in (_alive(), _addable()))
    return max(1, min(fit, limit) if limit else fit)
