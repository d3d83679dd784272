"""The live table of a sweep that runs elsewhere, from the lines of its job's log."""

import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from prefopt_ray.cluster.messages import EVENT, heard
from prefopt_ray.errors import printable
from prefopt_ray.report.terminal import TerminalObserver
from prefopt_ray.results.ledger import SweepRecord, fold
from prefopt_ray.spec import SweepSpec

DRAWN_S = 0.2  # at most so often


class Follower:
    """Shows what a job tells, line by line: in a terminal the table above which its words scroll. A context manager."""

    def __init__(self, console: Console, spec: SweepSpec) -> None:
        self._console, self._spec = console, spec
        self._observer = TerminalObserver(console)
        self._sweep = SweepRecord(Path())
        self._next = 0.0

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, *exception: object) -> None:
        self._observer.__exit__(*exception)

    def told(self, line: str) -> None:
        message = heard(line)
        if message is None:
            if line:
                self._console.print(Text(printable(line)), soft_wrap=True)
            return
        if message.kind != EVENT:
            return
        begun = bool(self._sweep.sweep_id)
        fold(self._sweep, message.value)
        if self._console.is_terminal:
            if not begun:
                self._observer.show_live(self._spec)
            if time.monotonic() >= self._next:  # the events so far come all at once
                self.draw()

    def draw(self) -> None:
        """The table as it is now; nothing in a file, where the job's own lines say it already."""
        if not self._console.is_terminal:
            return
        self._next = time.monotonic() + DRAWN_S
        self._observer.watch(self._sweep)
