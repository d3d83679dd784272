"""CPU seconds of a command and of everything it starts, however loosely it hangs on to it.

Ray's daemons and workers are nobody's waited-for children, so their time is in no parent's account. Every descendant
inherits an environment variable, though: processes that carry it are found in /proc and read several times a second.
What a process spends after its last reading is lost, at most `POLL_S` per process. Linux only.
"""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.timing import Spent

MARK = "PREFOPT_BENCHMARK_RUN"
POLL_S = 0.1
LINGER_S = 15.0  # daemons that end after the command; then they are ended

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
Process = tuple[int, int]  # pid and start time: a pid alone is used again


def spent_by(command: Sequence[str], *, cwd: Path, log: Path, env: Mapping[str, str]) -> Spent:
    """Run it to its end: seconds on the wall until it ends, CPU seconds of its whole family.

    Raises RuntimeError with the end of its output (kept in `log`) when it fails.
    """
    token = secrets.token_hex(8)
    family = Family(token)
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env={**env, MARK: token}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        linger_s = 0.0  # who is interrupted leaves nobody behind
        try:
            while process.poll() is None:
                family.read()
                time.sleep(POLL_S)
            wall_s, linger_s = time.perf_counter() - began, LINGER_S
        finally:
            family.end(within_s=linger_s)
            process.wait()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    return Spent(family.cpu_s, wall_s)


class Family:
    """Every process that carries the token, alive or gone, and what it has spent so far."""

    def __init__(self, token: str) -> None:
        self._mark = f"{MARK}={token}".encode()
        self._ticks: dict[Process, int] = {}
        self._strangers: set[Process] = set()  # looked at once

    @property
    def cpu_s(self) -> float:
        return sum(self._ticks.values()) / _TICKS

    def read(self) -> list[int]:
        """Read all clocks; the pids of the living."""
        alive = []
        for folder in _PROC.iterdir():
            if not folder.name.isdigit():
                continue
            found = _clock(folder)
            if found is None:
                continue
            process, ticks = found
            if process in self._strangers:
                continue
            if process not in self._ticks and not self._belongs(folder):
                self._strangers.add(process)
                continue
            self._ticks[process] = ticks
            alive.append(process[0])
        return alive

    def end(self, *, within_s: float) -> None:
        """Wait until all have gone, and kill those that have not by then."""
        deadline = time.monotonic() + within_s
        while alive := self.read():
            if time.monotonic() > deadline:
                for pid in alive:
                    _kill(pid)
            time.sleep(POLL_S)

    def _belongs(self, folder: Path) -> bool:
        try:
            return self._mark in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            return False  # gone, or somebody else's


def _clock(folder: Path) -> tuple[Process, int] | None:
    """A process and its ticks in user and kernel mode; None when it is gone or only waits to be buried."""
    try:
        text = (folder / "stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command's name may hold spaces
    if fields[0] in "ZX":
        return None
    return (int(folder.name), int(fields[19])), int(fields[11]) + int(fields[12])


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself
