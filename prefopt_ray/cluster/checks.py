"""What must hold of a cluster before a sweep begins on it: versions, room for a trial, secrets, storage that stays.

Every node is asked itself, by a task that takes none of its resources.
"""

import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefopt_ray import __version__
from prefopt_ray.errors import InputError, Problem
from prefopt_ray.spec import SweepSpec
from prefopt_ray.tuning.resources import trial_resources

ANSWER_S = 60.0  # a node must start a process to answer
# File systems that several machines see, or that stay when the machine goes.
_SHARED = ("nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "9p", "virtiofs", "afs", "efs")
_BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # where the launcher leaves its file on the head


def versions() -> dict[str, str]:
    """Of this machine: those that must be equal where a sweep is submitted and where it runs."""
    return {"prefopt": __version__, "ray": ray.__version__, "python": ".".join(platform.python_version_tuple()[:2])}


def find_problems(spec: SweepSpec, submitted_with: Mapping[str, str]) -> list[Problem]:
    """Everything that stands in the way, all at once; asks every node. Ray must be connected."""
    problems = [*_other_versions(submitted_with), *_no_room(spec)]
    try:
        nodes = _looks(spec)
    except OSError as error:
        return [*problems, Problem(
            "spec", "storage", str(spec.storage), f"cannot be written to on the cluster's head ({error.strerror})",
            "name a folder of the cluster with --storage",
        )]
    return [*problems, *_missing_secrets(spec, nodes), *_blind_nodes(spec, nodes), *_lost_with_the_cluster(spec)]


def _other_versions(submitted_with: Mapping[str, str]) -> Iterator[Problem]:
    for name, here in versions().items():
        there = submitted_with.get(name, "unknown")
        if there != here:
            yield Problem(
                "cluster", name, f"{name} {there} where it was submitted", f"the cluster has {name} {here}",
                "use the same on both: results are read by the version that wrote them",
            )


def _no_room(spec: SweepSpec) -> Iterator[Problem]:
    try:
        trial_resources(spec)
    except InputError as error:
        yield from error.problems


# -- what every node says --------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What a node sees."""

    node: str  # its address
    missing: tuple[str, ...]  # secrets without a value
    sees_storage: bool


@ray.remote(num_cpus=0, max_retries=1)
def _look(node: str, names: Sequence[str], marker: Path) -> Look:
    return Look(node, tuple(name for name in names if not os.environ.get(name)), marker.is_file())


def _looks(spec: SweepSpec) -> list[Look]:
    """One answer of each node. Raises OSError where the storage cannot be written to from here."""
    spec.storage.mkdir(parents=True, exist_ok=True)
    marker = spec.storage / f".seen-{secrets.token_hex(8)}"
    marker.touch()
    try:
        return ray.get([
            _look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                node["NodeManagerAddress"], spec.secrets, marker
            )
            for node in ray.nodes() if node["Alive"]
        ], timeout=ANSWER_S)
    finally:
        marker.unlink(missing_ok=True)


def _missing_secrets(spec: SweepSpec, nodes: Sequence[Look]) -> Iterator[Problem]:
    for name in spec.secrets:
        without = [look.node for look in nodes if name in look.missing]
        if without:
            yield Problem(
                "spec", "secrets", name, f"has no value on {', '.join(without)}",
                "set the variable where Ray is started on the nodes; it is never sent from here",
            )


def _blind_nodes(spec: SweepSpec, nodes: Sequence[Look]) -> Iterator[Problem]:
    blind = [look.node for look in nodes if not look.sees_storage]
    if blind:
        yield Problem(
            "spec", "storage", str(spec.storage), f"what the head writes there is not seen on {', '.join(blind)}",
            "name a folder on a file system that all nodes share",
        )


# -- what stays ------------------------------------------------------------------------------------


def _lost_with_the_cluster(spec: SweepSpec) -> Iterator[Problem]:
    """Results on a disk of the head, where the head itself goes with the cluster."""
    how = _ephemeral()
    if how and not on_shared_filesystem(spec.storage):
        yield Problem(
            "spec", "storage", str(spec.storage), f"is on the head's own disk, and {how}: it goes with the cluster",
            "name a folder on a file system that outlives the cluster",
        )


def _ephemeral() -> str:
    """Why the head's disk may not be there tomorrow; empty where nothing says so."""
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "the head is a pod"
    bootstrap = _BOOTSTRAP.expanduser()
    if bootstrap.is_file():
        provider = (yaml.safe_load(bootstrap.read_text()) or {}).get("provider", {}).get("type", "")
        if provider not in ("", "local"):
            return f"the head is a machine of {provider} that was started for the cluster"
    return ""


def on_shared_filesystem(folder: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether the file system under the folder is one of the network's, or a volume of its own in a pod."""
    if not mounts.is_file():
        return False
    places = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    under = [(place, kind) for place, kind in places if folder.resolve().is_relative_to(place)]
    place, kind = max(under, key=lambda found: len(found[0]), default=("/", ""))
    return kind in _SHARED or kind.startswith("fuse.") or (place != "/" and bool(os.environ.get("KUBERNETES_SERVICE_HOST")))
