"""Resident memory of this process, now and at its peak since the last `forget_peak`. Linux only."""

from pathlib import Path

_SELF = Path("/proc/self")


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    return _status("VmHWM")


def forget_peak() -> None:
    """Let the peak begin at what is resident now."""
    (_SELF / "clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {name}")
