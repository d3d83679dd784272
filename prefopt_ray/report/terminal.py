"""What a sweep looks like in a terminal: progress bars, a live table within 80 columns, the answer.

Without a terminal (a log file, CI) the same events become plain lines.
"""

import sys
import time
from collections.abc import Callable

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from prefopt_ray.results.answer import Answer, confirmation, ranking
from prefopt_ray.results.calibration import FEW_TRIALS, Calibration, Correlation
from prefopt_ray.results.judgement import Judgement
from prefopt_ray.results.ledger import SweepRecord, TrialRecord
from prefopt_ray.report.lines import answer_lines, gold_rewards
from prefopt_ray.spec import SweepSpec
from prefopt_ray.trial import Report

_COLOURS = {"diverged": "red", "broken": "red", "memorised": "yellow", "overfit": "yellow", "over-opt": "yellow",
            "drifted": "yellow", "collapsed": "magenta", "displaced": "magenta", "healthy": "green"}
_SHORT = {"collapsed_rejected": "collapsed", "likelihood_displaced": "displaced", "over_optimised": "over-opt",
          "inconclusive": "-", "stopped_early": "stopped",
          "stopped_overfit": "overfit", "stopped_by_user": "by user", "out_of_memory": "no memory"}
LOG_LINE_S = 10.0  # without a terminal: at most one progress line in this time


class TerminalObserver:
    """Observer of a sweep (see tuning.run) on a rich console. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._live: Live | None = None
        self._lines = _EndLines(console)
        self._expected = 0

    def __enter__(self) -> "TerminalObserver":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_bars()
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str) -> Callable[[int, int], None]:
        if not self._console.is_terminal:
            return _LoggedStage(self._console, name).advance
        if self._bars is None:
            columns = (TextColumn("{task.description:<18}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=self._console)
        bars, task = self._bars, None

        def advance(done: int, total: int) -> None:
            nonlocal task
            if task is None:  # a stage that has nothing to do shows no bar
                bars.start()
                task = bars.add_task(name, total=total)
            bars.update(task, completed=done, total=total)

        return advance

    def started(self, sweep: SweepRecord, spec: SweepSpec, notes: list[str]) -> None:
        self._close_bars()
        self._expected = spec.trial_count
        pairs = ", ".join(f"{count} {part}" for part, count in sweep.facts["pairs"].items())
        self._console.print(Text(f"{sweep.name} {sweep.sweep_id}: {self._expected} trials on {pairs} pairs"))
        if "engine" in sweep.facts:  # not in sweeps of earlier versions
            self._console.print(Text(f"engine: {sweep.facts['engine']}"))
        for note in notes:
            self._console.print(Text(f"note: {note}"), style="yellow")
        self._console.print(Text(f"results: {sweep.folder}"), soft_wrap=True)
        self._lines.skip_ended(sweep)
        if self._console.is_terminal:
            self.show_live(spec)

    def show_live(self, spec: SweepSpec) -> None:
        """From now on `watch` draws a table."""
        self._expected = spec.trial_count
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def watch(self, sweep: SweepRecord) -> None:
        if self._live is None:
            self._lines.print_new(sweep)
        else:
            self._live.update(live_table(sweep, expected=self._expected, height=self._console.height), refresh=True)

    def stopping(self) -> None:
        self._console.print(Text("Ctrl-C: running trials checkpoint and stop; once more ends at once"), style="yellow")

    def _close_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def live_table(sweep: SweepRecord, *, expected: int, height: int) -> Table:
    """The running trials, then the best ones, as many as fit; at most 80 columns."""
    trials = list(sweep.trials.values())
    running = [t for t in trials if t.end_state is None and not t.paused]
    ranked = [trial for standing in ranking(sweep) for trial in standing.configuration.trials]
    ended = [t for t in [*ranked, *confirming(sweep)] if t not in running]
    room = max(4, height - 6)
    shown = [*running, *ended][:room]
    ended_count = sum(1 for t in trials if t.end_state is not None)
    title = f"{ended_count} of {'up to ' if confirming(sweep) else ''}{expected} trials ended ({sweep.state_counts})"
    table = trial_table(shown, title=title)
    hidden = len(trials) - len(shown)
    if hidden > 0:
        table.caption = f"and {hidden} more, ranked lower"
    return table


def sweep_tables(sweep: SweepRecord, *, title: str = "") -> list[Table]:
    """The trials of the search in the order of their configurations, and those of the confirmation apart."""
    ranked = [trial for standing in ranking(sweep) for trial in standing.configuration.trials]
    tables = [trial_table(ranked, title=title)]
    if confirming(sweep):
        tables.append(trial_table(confirming(sweep), title="confirmation, with fresh seeds"))
    return tables


def confirming(sweep: SweepRecord) -> list[TrialRecord]:
    """The trials of the confirmation, best configuration first."""
    return [trial for configuration in confirmation(sweep) for trial in configuration.trials]


def trial_table(trials: list[TrialRecord], *, title: str = "") -> Table:
    """One row per trial, 80 columns at most.

    Behind a loss: its parameters beside beta whose values differ between its trials, which tell them apart. `best` is
    the gain at step `at`. With a gold reward there is its value at that step and at the end;
    otherwise the accuracy at that step.
    """
    gold = any(gold_rewards(trial) for trial in trials)
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    # Words may be cut where the line is too long; a number with a digit missing would be another number.
    words = {"verdict": 9, "state": 9}
    seeds = len({trial.seed for trial in trials}) > 1
    if seeds:
        table.add_column("seed", justify="right", no_wrap=True)
    for name in ("#", "loss", "beta", "lr", "step", "best", "at", "gold at>end" if gold else "acc", "verdict", "state"):
        if name == "loss":
            # Never cut: `sigmoid:js` and `sigmoid:alpha` would look the same. It alone gives way in a narrow terminal.
            table.add_column(name, overflow="fold")
        elif name in words:
            table.add_column(name, max_width=words[name], no_wrap=True, overflow="crop")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    if any(trial.unopposed for trial in trials):
        table.caption = "* passed a rung before any other trial was there"
        table.caption_justify = "left"
    varied = _varied(trials)
    for trial in trials:
        settings = [f"{name}={trial.config.loss_params[name]:.3g}" for name in varied[trial.config.loss]]
        first = [Text(str(trial.seed))] if seeds else []
        table.add_row(*first, *_cells(trial, loss=" ".join([trial.config.loss, *settings]), gold=gold))
    return table


def _varied(trials: list[TrialRecord]) -> dict[str, list[str]]:
    """Per loss, the parameters other than beta that have more than one value among its trials."""
    values: dict[str, dict[str, set[float]]] = {}
    for trial in trials:
        of_loss = values.setdefault(trial.config.loss, {})
        for name, value in trial.config.loss_params.items():
            of_loss.setdefault(name, set()).add(value)
    return {
        loss: [name for name, seen in of_loss.items() if name != "beta" and len(seen) > 1]
        for loss, of_loss in values.items()
    }


def _cells(trial: TrialRecord, *, loss: str, gold: bool) -> list[Text]:
    last = trial.last
    best = trial.reports.get(trial.best_step)
    verdict = _verdict_word(last)
    accuracy = f"{best.metrics['eval/rewards/accuracy']:.3f}" if best else "-"
    rewards = ">".join(f"{value:.2f}" for value in gold_rewards(trial)) or "-"
    mark = "b" if trial.baseline else "*" if trial.unopposed else ""
    return [
        Text(f"{trial.number}{mark}"), Text(loss),
        Text(_beta(trial)), Text(short_rate(trial.config.learning_rate)),
        Text(str(last.step if last else 0)), Text(f"{trial.score:.4f}" if best else "-"),
        Text(str(trial.best_step) if best else "-"), Text(rewards if gold else accuracy),
        Text(verdict, style=_COLOURS.get(verdict, "")), Text(_SHORT.get(trial.state, trial.state)),
    ]


def _beta(trial: TrialRecord) -> str:
    """Not every loss has one: ORPO's weight is called lambda, SLiC's margin delta."""
    beta = trial.config.loss_params.get("beta")
    return "-" if beta is None else f"{beta:.3g}"


def short_rate(rate: float) -> str:
    """5e-6, 3.5e-4: two digits and never more than six characters."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _verdict_word(report: Report | None) -> str:
    if report is None:
        return "-"
    headline = report.verdict.headline
    if headline in ("healthy", "inconclusive") and "drift_limit" in report.verdict.flags:
        return "drifted"
    return _SHORT.get(headline, headline)


class _EndLines:
    """One line per ended trial, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[str] = set()

    def skip_ended(self, sweep: SweepRecord) -> None:
        self._told = {t.trial_id for t in sweep.trials.values() if t.end_state is not None}

    def print_new(self, sweep: SweepRecord) -> None:
        for trial in list(sweep.trials.values()):
            if trial.end_state is not None and trial.trial_id not in self._told:
                self._told.add(trial.trial_id)
                best = "no valid score"
                if trial.score >= 0:
                    objective = trial.config.evaluation.objective_name
                    best = f"best {objective} {trial.score:.4f} at step {trial.best_step}"
                line = f"{time.strftime('%H:%M:%S')} trial {trial.trial_id} {trial.config.label}: {trial.end_state}, {best}"
                self._console.print(Text(f"{line}; {trial.reason}"), soft_wrap=True)


class _LoggedStage:
    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._next = 0.0
        self._finished = False

    def advance(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._finished or (now < self._next and done < total):
            return
        self._next, self._finished = now + LOG_LINE_S, done >= total
        self._console.print(Text(f"{self._name}: {done}/{total}"))


def quiet_libraries() -> None:
    """transformers draws a bar for every file it loads or saves; ours are enough."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def print_outcome(console: Console, sweep: SweepRecord, answer: Answer) -> None:
    """Every trial and the answer, or how to go on with a sweep that was stopped."""
    for table in sweep_tables(sweep):
        console.print(table)
    name = sweep.folder.name
    if not sweep.finished:
        console.print(f"stopped; `prefopt resume {name}` goes on from here")
        return
    for line in answer_lines(sweep, answer):
        console.print(line)
    console.print(f"\nprefopt best {name} > best.yaml   the configuration as a spec\n"
                  f"prefopt ui {name}                 every trial in MLflow")


def make_console(*, stderr: bool = False) -> Console:
    """A console that never interprets markup in data."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, markup=False, highlight=False, soft_wrap=not stream.isatty())


def judgement_table(judgement: Judgement) -> Table:
    """Every finalist as the judge sees it, the strongest first."""
    tournament = judgement.tournament
    if tournament is None:
        raise ValueError("a judgement without verdicts has no table")
    title = f"{judgement.judge}: % of {tournament.prompts} prompts won against the reference, and strength above it"
    table = Table(title=Text(f"{title}; 95 % intervals"), title_justify="left", box=SIMPLE)
    for name in ("trial", "configuration", "% won", "strength", "score"):
        left = name == "configuration"
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for row in tournament.competitors:
        finalist = judgement.finalist(row.competitor)
        wins = f"{100 * row.win_rate:.1f} ({100 * row.win_low:.0f} to {100 * row.win_high:.0f})"
        known = row.strength_low is not None
        bounds = f" ({row.strength_low:+.2f} to {row.strength_high:+.2f})" if known else " (-)"
        table.add_row(
            row.competitor, Text(f"{finalist.label} @{finalist.step}{' baseline' if finalist.baseline else ''}"), wins,
            f"{row.strength:+.2f}{bounds}", f"{finalist.score:.4f}",
        )
    return table


def calibration_table(calibration: Calibration) -> Table:
    """One row per measure: its rank correlation with the judge."""
    bounds = "too few trials for an interval" if calibration.trials < FEW_TRIALS else "95 % intervals"
    title = f"Spearman's rank correlation with {calibration.truth}, {calibration.trials} trials, {bounds}"
    table = Table(title=Text(title), title_justify="left", box=SIMPLE)
    for name in ("measure", "at the best step", "within each step"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for row in calibration.rows:
        table.add_row(row.measure, _correlation(row.at_best), _correlation(row.within_steps))
    return table


def _correlation(found: Correlation | None) -> str:
    if found is None:
        return "-"
    bounds = "" if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}; "
    repeated = f", {found.evaluations} evaluations" if found.evaluations > found.trials else ""
    return f"{found.rho:+.2f} ({bounds}{found.trials} trials{repeated})"
