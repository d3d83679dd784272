"""What this process has taken at most, stage by stage, and what the machine has: bytes.

On a CUDA device what counts is the device's memory, as torch reserves it, with the context; otherwise this process's resident set.
"""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

KIB = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
# Ray ends a worker when its node's memory is this full.
USABLE = 0.95
CUDA_CONTEXT = 500 * 2**20  # what a process takes beside torch's own memory; assumed, not measured
# A container's limit and what it uses of it, in both versions of cgroups.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass(frozen=True)
class Room:
    """Memory where trials run."""

    total: int
    available: int  # for trials: what nobody uses now, up to the point where workers are ended


class Gauge:
    """The peak since the process began, and by how much each stage raised it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seen = 0
        self.rises: dict[str, int] = {}  # stage -> bytes

    def mark(self, stage: str) -> None:
        """The stage ends here."""
        peak = max(self._seen, peak_bytes(self._device))
        self.rises[stage] = self.rises.get(stage, 0) + peak - self._seen
        self._seen = peak

    @property
    def peak(self) -> int:
        return self._seen


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return CUDA_CONTEXT + torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def room(device: str) -> Room:
    """Asked before anything is loaded."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return Room(total, free)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [(limit, used) for limit, used in _containers() if limit < machine]
    total = min([machine, *(limit for limit, _ in limits)])
    free = min([_available(), *(max(0, limit - used) for limit, used in limits)])
    own = peak_bytes(device)  # this process ends before trials begin
    return Room(total, max(0, free + own - int((1 - USABLE) * total)))


def _containers() -> list[tuple[int, int]]:
    """(limit, used) of the containers that this process runs in and that have a limit."""
    texts = [
        (limit.read_text().strip(), used.read_text().strip())
        for limit, used in _CGROUPS if limit.is_file() and used.is_file()
    ]
    return [(int(limit), int(used)) for limit, used in texts if limit.isdecimal() and used.isdecimal()]


def _available() -> int:
    """What can be taken without swapping."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
