"""What the nodes of a cluster see: each is asked itself, by a task that takes none of its resources."""

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prefopt_ray.errors import Problem, ResourceError

ANSWER_S = 60.0  # a node must start a process to answer


@dataclass(frozen=True)
class Look:
    """What a node sees."""

    node: str  # its address
    missing: tuple[str, ...]  # names of variables without a value
    sees_storage: bool


def look_from_nodes(storage: Path, names: Sequence[str] = ()) -> list[Look]:
    """One answer of each node. Raises OSError where the storage cannot be written to from here."""
    storage.mkdir(parents=True, exist_ok=True)
    marker = storage / f".seen-{secrets.token_hex(8)}"
    marker.touch()
    try:
        return ray.get([
            _look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                node["NodeManagerAddress"], tuple(names), marker
            )
            for node in ray.nodes() if node["Alive"]
        ], timeout=ANSWER_S)
    finally:
        marker.unlink(missing_ok=True)


def require_shared(storage: Path) -> None:
    """On several nodes, that all of them see the storage: a trial may go on on any. Raises ResourceError."""
    if sum(node["Alive"] for node in ray.nodes()) > 1:
        problems = list(blind_nodes(look_from_nodes(storage), storage))
        if problems:
            raise ResourceError(*problems)


def missing_secrets(looks: Sequence[Look], names: Sequence[str]) -> Iterator[Problem]:
    for name in names:
        without = [look.node for look in looks if name in look.missing]
        if without:
            yield Problem(
                "spec", "secrets", name, f"has no value on {', '.join(without)}",
                "set the variable where Ray is started on the nodes; it is never sent from here",
            )


def blind_nodes(looks: Sequence[Look], storage: Path) -> Iterator[Problem]:
    blind = [look.node for look in looks if not look.sees_storage]
    if blind:
        yield Problem(
            "spec", "storage", str(storage), f"what the driver writes there is not seen on {', '.join(blind)}",
            "name a folder on a file system that all nodes share",
        )


@ray.remote(num_cpus=0, max_retries=1)
def _look(node: str, names: Sequence[str], marker: Path) -> Look:
    return Look(node, tuple(name for name in names if not os.environ.get(name)), marker.is_file())
