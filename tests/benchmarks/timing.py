"""Clocks, the matrix-multiply peak of the machine, and paired ratios with their spread.

Two programs timed in the same round share what the machine was doing then: ratios are formed within a round and only
then summarised.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch


@dataclass(frozen=True)
class Spent:
    """Seconds: of this process's cores, and of the clock on the wall."""

    cpu_s: float
    wall_s: float

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s)

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.cpu_s - other.cpu_s, self.wall_s - other.wall_s)


@dataclass(frozen=True)
class Ratio:
    """Of paired rounds: the middle one, the smallest and the largest."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def now(device: torch.device | None = None) -> Spent:
    """This process's clocks, after what a GPU was given is done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return Spent(time.process_time(), time.perf_counter())


def paired_ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """`slower / faster`, round by round. Raises ValueError for unequal or no rounds, or a time that is not positive."""
    if not slower or len(slower) != len(faster):
        raise ValueError(f"rounds must come in pairs, got {len(slower)} and {len(faster)}")
    if min(*slower, *faster) <= 0:
        raise ValueError("a measured time must be positive")
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def matmul_peak(device: torch.device, dtype: torch.dtype, *, repeats: int = 3) -> float:
    """Floating-point operations per second of the fastest square product; one core on a CPU with one torch thread."""
    sizes = (8192, 4096) if device.type == "cuda" else (512, 1024)
    return max(_matmul_rate(size, device, dtype) for size in sizes for _ in range(repeats))


def _matmul_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = max(2, int((4e13 if device.type == "cuda" else 2e10) / (2 * size**3)))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    multiply()  # warm
    return times * 2 * size**3 / _seconds(multiply, device)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """CPU seconds on a CPU, since others may hold the core meanwhile; the wall's on a GPU."""
    began = now(device)
    work()
    spent = now(device) - began
    return spent.wall_s if device.type == "cuda" else spent.cpu_s


def machine(device: torch.device) -> dict[str, object]:
    """What a reader needs to place the numbers."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2), "python": platform.python_version(), "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "code": code(),
    }


def versions() -> Mapping[str, str]:
    found = {}
    for package in ("torch", "transformers", "peft", "trl", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # the machine with the GPU has neither trl nor ray
    return found


def code() -> str:
    """The commit of this checkout; with `-changed` where files differ from it."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return git("rev-parse", "--short=12", "HEAD") + ("-changed" if git("status", "--porcelain") else "")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
