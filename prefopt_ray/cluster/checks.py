"""What must hold of a cluster before a sweep begins on it: versions, room for a trial, secrets, storage that stays."""

import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import ray
import yaml

from prefopt_ray import __version__
from prefopt_ray.errors import InputError, Problem
from prefopt_ray.spec import SweepSpec
from prefopt_ray.tuning.nodes import blind_nodes, look_from_nodes, missing_secrets
from prefopt_ray.tuning.resources import trial_resources

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
        nodes = look_from_nodes(spec.storage, spec.secrets)
    except OSError as error:
        return [*problems, Problem(
            "spec", "storage", str(spec.storage), f"cannot be written to on the cluster's head ({error.strerror})",
            "name a folder of the cluster with --storage",
        )]
    found = (*missing_secrets(nodes, spec.secrets), *blind_nodes(nodes, spec.storage), *_lost_with_the_cluster(spec))
    return [*problems, *found]


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
