"""The journal of tracking operations on disk, and the thread that ships it.

The driver appends one line and goes on; a slow or dead server never blocks training and never loses a point.
Delivery is in order and at least once, so operations must be safe to deliver twice (see operations.py), with the
time of the append, never the time of sending. Knows nothing of MLflow: `deliver` is handed in.
No fsync: this survives the death of the process, not of the machine. One driver per sweep folder is the
ledger's rule and is not checked again here.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prefopt_ray.tracking import operations
from prefopt_ray.tracking.operations import Operation

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
ATTEMPTS_BEFORE_BLAME = 6  # about 6 s of a server that answers others but not this operation


@dataclass(frozen=True)
class Entry:
    """One journaled operation and when it was said, in milliseconds since 1970 (strictly increasing)."""

    at_ms: int
    operation: Operation


class Refused(Exception):
    """The server will never take this. `operation` is the refused part; the rest was delivered."""

    def __init__(self, operation: Operation, why: str) -> None:
        super().__init__(operation, why)
        self.operation = operation
        self.why = why


class Journal:
    """`operations.jsonl` (append-only), `delivered.json` (how far it is shipped), `refused.jsonl` (dead letters)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._operations_path = folder / "operations.jsonl"
        self._delivered_path = folder / "delivered.json"
        self.refused_path = folder / "refused.jsonl"
        self._operations_path.touch()
        _cut_torn_end(self._operations_path)
        self._lock = threading.Lock()
        self._writer = os.open(self._operations_path, os.O_WRONLY | os.O_APPEND)
        self._reader = self._operations_path.open("rb")
        self._delivered_bytes = min(self._read_delivered(), self._operations_path.stat().st_size)
        self._reader.seek(self._delivered_bytes)
        self.undelivered = sum(1 for _ in self._lines(self._delivered_bytes))
        self._last_ms = max((entry.at_ms for entry in self.entries()), default=0)

    def append(self, operation: Operation) -> None:
        """Write one line. Raises OSError when the disk does; nothing is shipped here."""
        with self._lock:
            # A clock that jumps back must not make an older value the latest one in MLflow.
            self._last_ms = max(time.time_ns() // 1_000_000, self._last_ms + 1)
            line = json.dumps({"t": self._last_ms, **operations.to_dict(operation)}, allow_nan=False) + "\n"
            _write_whole(self._writer, line.encode())
            self.undelivered += 1

    def entries(self) -> Iterator[Entry]:
        """Everything ever said, delivered or not, oldest first. Unreadable lines are left to the shipper."""
        for line in self._lines(0):
            try:
                yield _parse(line)
            except ValueError:
                continue

    def next_line(self) -> bytes | None:
        """The oldest undelivered line, or None. The same again until `mark_delivered`."""
        self._reader.seek(self._delivered_bytes)
        line = self._reader.readline()
        return line if line.endswith(b"\n") else None

    def mark_delivered(self, line: bytes) -> None:
        self._delivered_bytes += len(line)
        _replace(self._delivered_path, json.dumps({"bytes": self._delivered_bytes}))
        with self._lock:
            self.undelivered -= 1

    def refuse(self, line: bytes, *, operation: Operation | None, why: str) -> None:
        """Put an operation, or a line that is none, among the dead letters, for a person to read."""
        said = operations.to_dict(operation) if operation else {"line": line.decode(errors="replace")}
        with self.refused_path.open("a") as file:
            file.write(json.dumps({"why": why, **said}) + "\n")

    def close(self) -> None:
        """Once closed, appending raises OSError. Closing again does nothing."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1  # the number may soon be another file's
        self._reader.close()

    def _lines(self, start: int) -> Iterator[bytes]:
        with self._operations_path.open("rb") as file:
            file.seek(start)
            yield from file

    def _read_delivered(self) -> int:
        if not self._delivered_path.exists():
            return 0
        return int(json.loads(self._delivered_path.read_text())["bytes"])


class Shipper:
    """One daemon thread that delivers the journal in order, with its own backoff.

    `deliver(entry)` raises `Refused` for what the server will never take; that goes to the dead letters. Any other
    exception is retried: for as long as `server_answers()` is false, and ATTEMPTS_BEFORE_BLAME times when it is
    true, because then the operation and not the server is at fault and must not block those behind it.
    """

    def __init__(
        self, journal: Journal, deliver: Callable[[Entry], None], *, server_answers: Callable[[], bool]
    ) -> None:
        self._journal = journal
        self._deliver = deliver
        self._server_answers = server_answers
        self._work = threading.Event()
        self._deadline_s: float | None = None  # set by close: time.monotonic() after which we give up
        self._unreachable = False
        self._thread = threading.Thread(target=self._run, name="prefopt-tracking", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._work.set()

    def close(self, timeout_s: float) -> bool:
        """Deliver what is left for up to `timeout_s` seconds, then stop; the rest stays in the journal.

        False: a request is still waiting for its answer, and the thread ends with it.
        """
        self._deadline_s = time.monotonic() + timeout_s
        self.wake()
        self._thread.join(timeout_s + FIRST_WAIT_S)  # it looks at the clock between requests
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._out_of_time():
            line = self._journal.next_line()
            if line is not None:
                self._ship(line)
            elif self._deadline_s is not None:
                return
            else:
                self._work.wait()
                self._work.clear()

    def _ship(self, line: bytes) -> None:
        try:
            entry = _parse(line)
        except ValueError as error:
            self._refuse(line, operation=None, why=f"not an operation: {error}")
            return
        attempt = 0
        while not self._out_of_time():
            attempt += 1
            try:
                self._deliver(entry)
            except Refused as refusal:
                self._refuse(line, operation=refusal.operation, why=refusal.why)
                return
            # MLflow lets the errors of requests, SQLAlchemy and the object stores through, so: any other error.
            except Exception as error:  # noqa: BLE001
                if attempt >= ATTEMPTS_BEFORE_BLAME and self._server_answers():
                    self._refuse(line, operation=entry.operation, why=f"{type(error).__name__}: {error}")
                    return
                self._warn_once(error)
                self._pause(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)))
            else:
                self._journal.mark_delivered(line)
                self._cheer_once()
                return

    def _refuse(self, line: bytes, *, operation: Operation | None, why: str) -> None:
        log.warning("MLflow refused an operation (kept in %s): %s", self._journal.refused_path, why)
        self._journal.refuse(line, operation=operation, why=why)
        self._journal.mark_delivered(line)

    def _pause(self, seconds: float) -> None:
        """Sleep; once closing, only briefly, because what is left of the time should be spent trying."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._out_of_time():
            if self._deadline_s is not None:
                end = min(end, time.monotonic() + FIRST_WAIT_S)
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))

    def _out_of_time(self) -> bool:
        return self._deadline_s is not None and time.monotonic() > self._deadline_s

    def _warn_once(self, error: Exception) -> None:
        if not self._unreachable:
            reason = " ".join(str(error).split())[:200]
            log.warning("MLflow does not answer; training goes on and the journal keeps everything. %s", reason)
        self._unreachable = True

    def _cheer_once(self) -> None:
        if self._unreachable:
            log.warning("MLflow answers again; %d operations to deliver.", self._journal.undelivered)
        self._unreachable = False


def _parse(line: bytes) -> Entry:
    """Raises ValueError on a line that is not a journaled operation."""
    try:
        data = json.loads(line)
        return Entry(data.pop("t"), operations.from_dict(data))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _cut_torn_end(path: Path) -> None:
    """A process killed inside a write leaves half a line; nobody was told it was kept, so it goes."""
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _write_whole(descriptor: int, data: bytes) -> None:
    """One write call nearly always; a short write (full disk, signal) is continued or raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
