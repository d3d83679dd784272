"""The live table of a sweep that runs elsewhere, from the lines of its job's log."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from prefopt_ray.cluster.messages import EVENT, heard
from prefopt_ray.errors import printable
from prefopt_ray.report.terminal import TerminalObserver
from prefopt_ray.results.ledger import SweepRecord, fold
from prefopt_ray.spec import SweepSpec


class Follower:
    """Shows what a job tells, line by line: in a terminal the table above which its words scroll. A context manager."""

    def __init__(self, console: Console, spec: SweepSpec) -> None:
        self._console, self._spec = console, spec
        self._observer = TerminalObserver(console)
        self._sweep = SweepRecord(Path())

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
        if self._console.is_terminal:  # elsewhere the job's own lines say it already
            if not begun:
                self._observer.show_live(self._spec)
            self._observer.watch(self._sweep)
