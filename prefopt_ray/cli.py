"""`prefopt`: parse, call, print. Heavy imports stay inside the commands, so `--help` and `validate` are quick.

Exit codes: 0 = at least one trial has a valid score, or the command did its work; 1 = none has, or the
work failed; 2 = the input is wrong; 130 = stopped by Ctrl-C.
"""

import argparse
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt_ray import __version__
from prefopt_ray.errors import InputError, PrefoptError, Problem, SpecError, SweepError, printable

if TYPE_CHECKING:
    from prefopt_ray.results.ledger import SweepRecord
    from prefopt_ray.spec import SweepSpec

DEFAULT_STORAGE = "prefopt-results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PrefoptError as error:
        if options.debug:
            raise
        _print_error(error)
        return error.exit_code
    except Exception as error:
        # The rim: whatever no layer expected is told in one line, with the way to see the rest.
        if options.debug:
            raise
        print(f"prefopt: {type(error).__name__}: {error}\nrun again with --debug for the traceback", file=sys.stderr)
        return 1


# -- on a cluster ----------------------------------------------------------------------------------


def submit(options: argparse.Namespace) -> int:
    spec = _load(options)
    if spec.storage == Path(DEFAULT_STORAGE).absolute():
        raise SweepError(Problem(
            options.spec, "storage", "", "on a cluster results need a folder that all its nodes share",
            "name it with --storage, such as --storage /mnt/prefopt",
        ))
    from prefopt_ray.cluster import commands

    return commands.submit(spec, options)


def status(options: argparse.Namespace) -> int:
    from prefopt_ray.cluster import commands

    return commands.status(options)


def logs(options: argparse.Namespace) -> int:
    from prefopt_ray.cluster import commands

    return commands.logs(options)


def stop(options: argparse.Namespace) -> int:
    from prefopt_ray.cluster import commands

    return commands.stop(options)


# -- before a sweep --------------------------------------------------------------------------------


def validate(options: argparse.Namespace) -> int:
    from prefopt_ray.spec import dump_spec

    spec = _load(options)
    if options.json:
        print(json.dumps({"name": spec.name, "content_hash": spec.content_hash(), "trials": spec.trial_count,
                          "spec": spec.to_dict()}))
    elif options.resolved:
        print(dump_spec(spec), end="")
    else:
        losses = ", ".join(spec.loss_spaces())
        counted = f"{spec.trial_count} trials over {losses}"
        if len(spec.seeds) > 1:
            counted += f", {spec.configuration_count} configurations with {len(spec.seeds)} seeds each"
        if spec.confirm is not None:
            counted += f", at most {spec.confirm_count} of them to confirm the best {spec.confirm.top}"
        print(f"{options.spec}: valid; {counted}; scheduler {_scheduler_said(spec)}")
    return 0


def _scheduler_said(spec: "SweepSpec") -> str:
    """`asha, 1 in 3 goes on at steps 18, 53 of 160`; in percent where the length is only known with the data."""
    scheduler = spec.scheduler
    training = spec.training
    if not scheduler.has_rungs or (training.epochs is not None and training.stop_step is not None):
        return scheduler.kind
    if training.epochs is not None:
        rungs = "at " + ", ".join(f"{step / 100:.0f}%" for step in spec.rung_steps(10_000)) + " of the training"
    else:
        length = spec.total_steps(train_pairs=0)  # not read: the length is given
        rungs = f"at steps {', '.join(map(str, spec.rung_steps(length)))} of {length}"
    return f"{scheduler.kind}, 1 in {scheduler.factor} goes on {rungs}"


def pairs(options: argparse.Namespace) -> int:
    spec = _load_to_run(options)
    from dataclasses import asdict

    from prefopt_ray.pairs.show import render_pairs, show_pairs
    from prefopt_ray.prepare import prepare
    from prefopt_ray.report.terminal import TerminalObserver, make_console

    _quiet_libraries()
    with TerminalObserver(make_console(stderr=True)) as observer:
        prepared = prepare(spec, stage=observer.stage, device="cpu", threads=1)
    loaded = prepared.loaded
    views = show_pairs(loaded, prepared.tokenizer, options.show)
    if options.json:
        print(json.dumps({
            "pairs": {name: len(part) for name, part in loaded.data.parts.items()},
            "drops": [asdict(drop) for drop in loaded.drops],
            "truncation": {name: asdict(cut) for name, cut in loaded.truncation.items()},
            "warnings": list(loaded.warnings),
            "shown": [asdict(view) for view in views],
        }, ensure_ascii=False))
    else:
        make_console().print(render_pairs(views, loaded))
    return 0


def plan(options: argparse.Namespace) -> int:
    spec = _load_to_run(options)
    from prefopt_ray.plan.lines import plan_json, plan_lines
    from prefopt_ray.report.terminal import TerminalObserver, make_console
    from prefopt_ray.tuning.planning import plan_sweep

    _quiet_libraries()
    with TerminalObserver(make_console(stderr=True)) as observer:
        planned = plan_sweep(spec, stage=observer.stage)
    print(json.dumps(plan_json(planned)) if options.json else "\n".join(plan_lines(planned)))
    return 0 if planned.fitting else 1


def verify(options: argparse.Namespace) -> int:
    spec = _load_to_run(options)
    from prefopt_ray.report.terminal import TerminalObserver, make_console
    from prefopt_ray.tuning.resources import refuse_impossible
    from prefopt_ray.verify.lines import verification_json, verification_lines
    from prefopt_ray.verify.steps import verify_steps

    _quiet_libraries()
    refuse_impossible(spec)  # a model meant for a GPU would take hours here
    with TerminalObserver(make_console(stderr=True)) as observer:
        found = verify_steps(spec, steps=options.steps, stage=observer.stage)
    if options.json:
        print(json.dumps(verification_json(found, name=spec.name)))
    else:
        print("\n".join(verification_lines(found, name=spec.name)))
    return 0 if found.agree else 1


def losses(options: argparse.Namespace) -> int:
    from prefopt_ray.report.loss_pages import loss_facts, loss_list, loss_list_facts, loss_page
    from prefopt_ray.losses.cards import find_card
    from prefopt_ray.spec.rules import unknown_loss

    if options.name is None:
        print(json.dumps(loss_list_facts()) if options.json else loss_list())
        return 0
    try:
        print(json.dumps(loss_facts(find_card(options.name))) if options.json else loss_page(options.name))
    except KeyError as error:
        rule, fix = unknown_loss(options.name)
        raise SpecError(Problem("command line", "NAME", repr(options.name[:200]), rule, fix)) from error
    return 0


# -- sweeps ----------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    spec = _load_to_run(options)
    from prefopt_ray.tuning.run import resume_sweep, run_sweep, unfinished_sweep

    begun = unfinished_sweep(spec) if options.resume else None
    if begun is None:
        return _sweep_with_terminal(lambda observer: run_sweep(spec, observer), as_json=options.json)
    print(f"going on with {begun.name}", file=sys.stderr)
    return _sweep_with_terminal(lambda observer: resume_sweep(begun, observer), as_json=options.json)


def resume(options: argparse.Namespace) -> int:
    folder = _sweep_folder(options)
    from prefopt_ray.tuning.run import resume_sweep

    return _sweep_with_terminal(lambda observer: resume_sweep(folder, observer), as_json=options.json)


def best(options: argparse.Namespace) -> int:
    from prefopt_ray.results.answer import find_answer
    from prefopt_ray.results.ledger import read_sweep
    from prefopt_ray.report.lines import answer_json, answer_lines

    sweep = read_sweep(_sweep_folder(options))
    answer = find_answer(sweep)
    if options.json:
        print(json.dumps(answer_json(sweep, answer)))
    else:
        for line in answer_lines(sweep, answer):
            print(f"# {line}")
        if answer.winner is not None:
            print(_one_point_yaml(sweep), end="")
    return 0 if answer.winner is not None else 1


def show(options: argparse.Namespace) -> int:
    from prefopt_ray.results.answer import find_answer
    from prefopt_ray.results.ledger import read_sweep
    from prefopt_ray.report.lines import answer_lines, engine_lines, leaderboard
    from prefopt_ray.report.terminal import make_console, sweep_tables

    sweep = read_sweep(_sweep_folder(options))
    answer = find_answer(sweep)
    if options.json:
        print(json.dumps({"sweep": sweep.sweep_id, "finished": sweep.finished, "trials": leaderboard(answer)}))
        return 0
    console = make_console()
    for table in sweep_tables(sweep, title=f"{sweep.name} {sweep.sweep_id}"):
        console.print(table)
    for line in [*answer_lines(sweep, answer), *engine_lines(sweep)]:
        console.print(line)
    for trial in sweep.trials.values():
        if trial.reason and options.reasons:
            console.print(f"{trial.trial_id} {trial.end_state}: {trial.reason}")
    return 0


def judge(options: argparse.Namespace) -> int:
    folder = _sweep_folder(options)
    from prefopt_ray.results.judgement import judgement_lines
    from prefopt_ray.report.terminal import TerminalObserver, judgement_table, make_console
    from prefopt_ray.tuning.judging import chosen_questions
    from prefopt_ray.tuning.run import judge_again

    with _named_as_typed("--with", "judge", example="callable=judges.py:score"):
        asked = chosen_questions(folder, options.judge_with, top=options.top, prompts=options.prompts)
    _quiet_libraries()
    with TerminalObserver(make_console(stderr=True)) as observer:
        judgements = [judge_again(folder, question, observer) for question in asked]
    if options.json:
        print(json.dumps({"folder": str(folder), "judgements": [judgement.to_dict() for judgement in judgements]}))
        return 0
    console = make_console()
    for judgement in judgements:
        console.print(judgement_table(judgement))
        for line in judgement_lines(judgement, best=judgement.finalists[0].trial_id):
            console.print(line, markup=False)
    return 0


def calibrate(options: argparse.Namespace) -> int:
    from prefopt_ray.results.calibration import calibrate_sweep
    from prefopt_ray.results.ledger import read_sweep
    from prefopt_ray.report.terminal import calibration_table, make_console

    calibrations = calibrate_sweep(read_sweep(_sweep_folder(options)))
    if options.json:
        print(json.dumps({"calibrations": [calibration.to_dict() for calibration in calibrations]}))
        return 0
    console = make_console()
    for calibration in calibrations:
        if any(row.at_best or row.within_steps for row in calibration.rows):
            console.print(calibration_table(calibration))
        console.print(f"By {calibration.truth}: {calibration.conclusion}", markup=False)
    return 0


def explain(options: argparse.Namespace) -> int:
    folder = _sweep_folder(options)
    from prefopt_ray.results.answer import require_known_losses
    from prefopt_ray.report.explain import explain_trial, explanation_json, explanation_lines
    from prefopt_ray.results.ledger import read_sweep
    from prefopt_ray.spec import load_spec

    sweep = read_sweep(folder)
    require_known_losses(sweep)
    with _named_as_typed("--verdicts", "verdicts", example="overfit_z=3"):
        spec = load_spec(folder / "spec.yaml", overrides=[f"verdicts.{setting}" for setting in options.verdicts])
    explanation = explain_trial(sweep, options.trial, spec.thresholds, at=options.at)
    if options.json:
        print(json.dumps(explanation_json(explanation)))
    else:
        print("\n".join(explanation_lines(explanation)))
    return 0


def replay(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from prefopt_ray.results.curves import read_table
    from prefopt_ray.tuning.replay import DEFAULT_SCHEDULERS, measure, parse_scheduler, replay_lines

    schedulers = [parse_scheduler(text) for text in options.scheduler or DEFAULT_SCHEDULERS]
    tables = [read_table(_table_path(table, options.storage)) for table in options.tables]
    measured = measure(
        tables, schedulers, slots=options.slots, orders=options.orders, within_loss=options.within == "loss"
    )
    if options.json:
        print(json.dumps({
            "tables": [{"name": t.name, "curves": len(t.curves), "left_out": dict(t.left_out)} for t in tables],
            "slots": options.slots, "orders": options.orders, "within": options.within,
            "schedulers": [asdict(m) for m in measured],
        }))
    else:
        print("\n".join(replay_lines(tables, measured, slots=options.slots, orders=options.orders)))
    return 0


def list_sweeps(options: argparse.Namespace) -> int:
    if options.address:
        from prefopt_ray.cluster import commands

        return commands.list_jobs(options)
    from prefopt_ray.results.ledger import LEDGER_FILE, read_sweep

    storage = Path(options.storage or DEFAULT_STORAGE)
    folders = sorted(p.parent for p in storage.glob(f"*/{LEDGER_FILE}")) if storage.is_dir() else []
    sweeps, unreadable = [], []
    for folder in folders:
        try:
            sweeps.append(read_sweep(folder))
        except SweepError as error:  # one damaged folder hides no other
            unreadable.extend(error.problems)
    if options.json:
        print(json.dumps([{"sweep": s.sweep_id, "name": s.name, "folder": str(s.folder), "finished": s.finished,
                           "trials": len(s.trials)} for s in sweeps]))
    else:
        for sweep in sweeps:
            print(f"{sweep.folder.name:<32} {'finished' if sweep.finished else 'open':<9} {sweep.state_counts}")
        if not folders:
            print(f"no sweeps in {storage}")
    if unreadable:
        raise SweepError(*unreadable)
    return 0


def ui(options: argparse.Namespace) -> int:
    from prefopt_ray.results.ledger import read_sweep
    from prefopt_ray.spec import load_spec
    from prefopt_ray.tracking.runs import tracking_uri
    from prefopt_ray.tracking.server import serve_ui

    folder = _sweep_folder(options)
    sweep, spec = read_sweep(folder), load_spec(folder / "spec.yaml")
    uri = tracking_uri(spec.tracking.mlflow, spec.storage)
    with serve_ui(uri, None, experiment=spec.experiment, sweep_id=sweep.sweep_id, port=options.port) as link:
        print(json.dumps({"url": link}) if options.json else link, flush=True)
        if uri.startswith(("http://", "https://")):
            return 0
        print("serving on this machine only; Ctrl-C ends it", file=sys.stderr)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


def figure(options: argparse.Namespace) -> int:
    from prefopt_ray.results.ledger import read_sweep
    from prefopt_ray.spec import load_spec
    from prefopt_ray.report.sweep_figures import FIGURES, draw
    from prefopt_ray.tracking.artifacts import attach
    from prefopt_ray.tracking.runs import tracking_uri

    folder = _sweep_folder(options)
    sweep, spec = read_sweep(folder), load_spec(folder / "spec.yaml")
    if options.kind not in FIGURES:
        raise SweepError(Problem("command line", "KIND", repr(options.kind), f"must be one of {', '.join(FIGURES)}"))
    file = folder / "report" / f"{options.kind}.svg"
    file.parent.mkdir(exist_ok=True)
    draw(sweep, options.kind).savefig(file)
    print(json.dumps({"figure": str(file)}) if options.json else file)
    if sweep.run_id is not None:
        uri = tracking_uri(spec.tracking.mlflow, spec.storage)
        attach(file, uri=uri, run_id=sweep.run_id, artifact_path="figures")
    return 0


# -- one trial -------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    spec = _load_to_run(options)
    if not spec.is_one_point:
        raise SweepError(Problem(
            str(options.spec), "search", f"{spec.trial_count} configurations", "train takes a spec with exactly one",
            "use `prefopt run`, or the spec that `prefopt best SWEEP` prints",
        ))
    if options.output is not None:
        _require_folder("command line", "--output", Path(options.output))
    from prefopt_ray.prepare import open_worker
    from prefopt_ray.report.lines import report_line
    from prefopt_ray.report.terminal import TerminalObserver, make_console
    from prefopt_ray.train import train as train_trial
    from prefopt_ray.train.export import export, load_best

    console = make_console(stderr=True)
    _quiet_libraries()
    with TerminalObserver(console) as observer:
        worker, prepared = open_worker(spec, stage=observer.stage)
    ((loss, values),) = spec.grid()
    config = prepared.trial_config(loss, values)
    folder = Path(options.output or spec.storage / f"{spec.name}-{config.digest()}")
    report = None
    for report in train_trial(config, worker, folder=folder):
        console.print(report_line(report))
    if report is None or report.best_step < 0:
        print(f"no valid evaluation: {report.reason if report else 'nothing was trained'}", file=sys.stderr)
        return 1
    load_best(config, worker, folder, best_step=report.best_step)
    exported = export(config, worker, folder)
    prepared.tokenizer.save_pretrained(exported)
    if options.json:
        print(json.dumps({"folder": str(exported), **report.to_dict()}))
    else:
        value = f"{config.evaluation.objective_name} {report.best_so_far:.4f}"
        print(f"best {value} at step {report.best_step}: {exported}")
    return 0


# -- inside ----------------------------------------------------------------------------------------


def _sweep_with_terminal(work: Callable[[Any], "SweepRecord"], *, as_json: bool) -> int:
    from prefopt_ray.results.answer import find_answer
    from prefopt_ray.report.lines import answer_json
    from prefopt_ray.report.terminal import TerminalObserver, make_console, print_outcome

    _quiet_libraries()
    console = make_console(stderr=as_json)
    with TerminalObserver(console) as observer:
        sweep = work(observer)
    answer = find_answer(sweep)
    print_outcome(console, sweep, answer)
    if not sweep.finished:
        return 130
    if as_json:
        print(json.dumps(answer_json(sweep, answer)))
    return 0 if answer.winner is not None else 1


def _one_point_yaml(sweep: "SweepRecord") -> str:
    from prefopt_ray.results.answer import find_answer
    from prefopt_ray.results.ledger import CONFIRM
    from prefopt_ray.spec import confirmed_spec, dump_spec, load_spec, one_point_spec

    winner = find_answer(sweep).winner
    spec, config = load_spec(sweep.folder / "spec.yaml"), winner.config
    if winner.first.role == CONFIRM:
        searched = sweep.trials[winner.key].config
        return dump_spec(confirmed_spec(spec, searched, length=winner.best_step, seed=config.seed))
    return dump_spec(one_point_spec(
        spec, config.loss, winner.first.values, stop_step=winner.best_step,
        total_steps=config.training.total_steps, evaluation=config.evaluation,
    ))


def _quiet_libraries() -> None:
    from prefopt_ray.report.terminal import quiet_libraries

    quiet_libraries()


def _load(options: argparse.Namespace) -> "SweepSpec":
    from prefopt_ray.spec import load_spec

    return load_spec(Path(options.spec), overrides=options.set, storage=options.storage)


@contextmanager
def _named_as_typed(option: str, section: str, *, example: str) -> Iterator[None]:
    """`option` is a `--set` of one section: say what is wrong with it under the name that was typed."""
    from prefopt_ray.spec.layers import SET_EXAMPLE

    def typed(text: str) -> str:
        return text.replace(SET_EXAMPLE, f"write {option} {example}").replace(f"--set {section}.", f"{option} ")

    try:
        yield
    except SpecError as error:
        problems = (replace(p, place=typed(p.place), fix=typed(p.fix)) for p in error.problems)
        raise SpecError(*problems) from error


def _load_to_run(options: argparse.Namespace) -> "SweepSpec":
    """The spec, before anything heavy is imported. Raises SpecError and SweepError."""
    spec = _load(options)
    _require_folder("command line" if options.storage is not None else options.spec, "storage", spec.storage)
    return spec


def _require_folder(place: str, key: str, folder: Path) -> None:
    """Refuse a folder that can never be written to before an hour of work wants to; nothing is created yet."""
    try:
        nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        rule = "" if nearest.is_dir() else f"{nearest} is a file" if nearest.is_file() else f"{nearest} is no folder"
        if not rule and not os.access(nearest, os.W_OK | os.X_OK):
            rule = f"{nearest} may not be written to"
    except OSError as error:
        rule = f"cannot be a folder: {error.strerror}"
    if rule:
        raise SweepError(Problem(place, key, repr(str(folder)[:200]), rule, "name a folder that you may write to"))


def _sweep_folder(options: argparse.Namespace) -> Path:
    """A folder, or the name or id of a sweep in the storage folder. Raises SweepError."""
    from prefopt_ray.results.ledger import LEDGER_FILE

    wanted = options.sweep
    storage = Path(options.storage or DEFAULT_STORAGE)
    try:
        if (Path(wanted) / LEDGER_FILE).is_file():
            return Path(wanted).resolve()
        known = sorted(p.parent for p in storage.glob(f"*/{LEDGER_FILE}")) if storage.is_dir() else []
    except OSError as error:
        rule = f"cannot be looked for: {error.strerror}"
        raise SweepError(Problem("command line", "SWEEP", repr(wanted[:200]), rule, "see `prefopt list`")) from error
    found = [p for p in known if wanted in (p.name, p.name.rpartition("-")[0], p.name.rpartition("-")[2])]
    if found:
        newest = max(found, key=lambda folder: (folder / LEDGER_FILE).stat().st_mtime)
        if len(found) > 1:
            print(f"{len(found)} sweeps are named {wanted}; taking the latest, {newest.name}", file=sys.stderr)
        return newest.resolve()
    names = ", ".join(p.name for p in known) or "none"
    rule = f"no such sweep in {storage}"
    raise SweepError(Problem("command line", "SWEEP", repr(wanted), rule, f"sweeps there: {names}; or give --storage"))


def _table_path(wanted: str, storage: str | None) -> Path:
    """A file of curves as it is; anything else is a sweep's name, id or folder. Raises SweepError."""
    if Path(wanted).is_file():
        return Path(wanted)
    if Path(wanted).suffix in (".csv", ".jsonl"):
        rule = "no such file"
        raise SweepError(Problem("command line", "TABLE", repr(wanted[:200]), rule, "give a table of curves, or a sweep"))
    return _sweep_folder(argparse.Namespace(sweep=wanted, storage=storage))


def _print_error(error: PrefoptError) -> None:
    lines = error.problems if isinstance(error, InputError) else (error,)
    for line in lines:
        print(f"prefopt: {printable(str(line))}", file=sys.stderr)


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 16 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


Declare = Callable[..., argparse.ArgumentParser]  # one sub-command; see `command` in `_parser`


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefopt",
        description="Which preference-optimisation loss, which beta, which learning rate, and when to stop.",
        epilog="example: prefopt run sweeps/quickstart.yaml",
    )
    parser.add_argument("--version", action="version", version=f"prefopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], *, text: str, example: str,
                takes: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {example}")
        sub.add_argument("--storage", help="folder of results (default: the spec's, or ./prefopt-results)")
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if takes == "spec":
            sub.add_argument("spec", metavar="SPEC", help="a YAML file")
            sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                             help="override one key, such as training.steps=100")
        elif takes == "job":
            sub.add_argument("sweep", metavar="SWEEP", help="a sweep's name or id, or its job")
        elif takes == "sweep":
            sub.add_argument("sweep", metavar="SWEEP", help="a sweep's name, id or folder")
        sub.set_defaults(command=function)
        return sub

    for declare in (_sweep_commands, _spec_commands, _question_commands, _cluster_commands):  # the most used first
        declare(command)
    return parser


def _cluster_commands(command: Declare) -> None:
    url = "http://127.0.0.1:8265"
    submitted = command("submit", submit, text="run a sweep on a Ray cluster, or go on with it there", takes="spec",
                        example=f"prefopt submit sweeps/qwen05b.yaml --storage /mnt/prefopt --address {url} --follow")
    submitted.add_argument("--new", action="store_true", help="begin afresh even where this very spec has a sweep")
    submitted.add_argument("--print-rayjob", action="store_true",
                           help="print the sweep as Kubernetes objects for KubeRay instead")
    asked = command("status", status, text="how far a sweep on a cluster is", takes="job",
                    example=f"prefopt status qwen05b-uf --address {url}")
    read = command("logs", logs, text="what a sweep on a cluster says", takes="job",
                   example=f"prefopt logs qwen05b-uf --follow --address {url}")
    read.add_argument("--trial", help="lines about this trial only, such as 0003")
    stopped = command("stop", stop, text="end a sweep on a cluster; its trials checkpoint", takes="job",
                      example=f"prefopt stop qwen05b-uf --address {url}")
    stopped.add_argument("--now", action="store_true", help="at once; what was reported is kept")
    for sub in (submitted, asked, read, stopped):
        sub.add_argument("--address", help="of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    for sub in (submitted, read):
        sub.add_argument("--follow", action="store_true", help="stay and show what happens")


def _sweep_commands(command: Declare) -> None:
    ran = command("run", run, text="run a sweep and print the answer", takes="spec",
                  example="prefopt run sweeps/quickstart.yaml --set search.seed=1")
    ran.add_argument("--resume", action="store_true",
                     help="go on with the latest sweep of this very spec, if it has no answer yet")
    command("best", best, text="the best configuration as a spec, with how sure that is", takes="sweep",
            example="prefopt best quickstart > best.yaml")
    shown = command("show", show, text="every trial of a sweep and the answer so far", takes="sweep",
                    example="prefopt show quickstart --reasons")
    shown.add_argument("--reasons", action="store_true", help="why each trial ended")
    served = command("ui", ui, text="open a sweep in MLflow, served on this machine only", takes="sweep",
                     example="prefopt ui quickstart")
    served.add_argument("--port", type=_number(0, 65535), default=0,
                        help="port on the loopback interface (default: a free one)")
    command("resume", resume, text="continue a sweep after Ctrl-C or a crash", takes="sweep",
            example="prefopt resume quickstart")
    listed = command("list", list_sweeps, text="the sweeps in the storage folder, or on a cluster", takes="nothing",
                     example="prefopt list")
    listed.add_argument("--address", help="of a cluster's dashboard: the jobs there instead")


def _spec_commands(command: Declare) -> None:
    checked = command("validate", validate, text="check a spec in about a second", takes="spec",
                      example="prefopt validate sweeps/qwen05b.yaml")
    checked.add_argument("--resolved", action="store_true", help="print the spec with every default filled in")
    looked = command("pairs", pairs, text="look at the pairs as they will be trained on", takes="spec",
                     example="prefopt pairs sweeps/quickstart.yaml --show 5")
    looked.add_argument("--show", type=_number(0, 10**9), default=3, metavar="N", help="how many pairs (default 3)")
    command("plan", plan, text="what a sweep will take: time, memory, evaluating's share", takes="spec",
            example="prefopt plan sweeps/quickstart.yaml")
    verified = command("verify", verify, text="do the engines and TRL compute the same on your model and pairs?",
                       takes="spec", example="prefopt verify sweeps/quickstart.yaml --steps 8")
    verified.add_argument("--steps", type=_number(1, 1000), default=8, help="optimizer steps (default 8)")
    cards = command("losses", losses, text="every loss, or one loss on a page", takes="nothing",
                    example="prefopt losses ipo_sum")
    cards.add_argument("name", metavar="NAME", nargs="?", help="a loss, such as ipo_sum or sigmoid:js")
    trained = command("train", train, text="train one configuration without Ray", takes="spec",
                      example="prefopt train best.yaml --output my-adapter")
    trained.add_argument("--output", metavar="DIR", help="folder for checkpoints and the adapter")


def _question_commands(command: Declare) -> None:
    """What can be asked of a sweep that has run."""
    judged = command("judge", judge, text="win rates of the best checkpoints against the reference, by a judge",
                     takes="sweep", example="prefopt judge quickstart --top 4")
    judged.add_argument("--top", type=_number(1, 10**4), metavar="K", help="finalists besides the baseline; after a "
                        "confirmation, of the search besides the confirmed ones (default: the spec's, or 4)")
    judged.add_argument("--prompts", type=_number(2, 10**6), metavar="N",
                        help="test prompts (default: the spec's, or 512)")
    judged.add_argument("--with", dest="judge_with", action="append", default=[], metavar="KEY=VALUE",
                        help="another judge than the spec's: reward_model=org/model, callable=judges.py:score, or "
                             "endpoint.url=... with endpoint.model=... and endpoint.key_env=...")
    command("calibrate", calibrate, text="how well gain, accuracy and drift rank this sweep's trials, by its judge",
            takes="sweep", example="prefopt calibrate quickstart")
    reasoned = command("explain", explain, text="every verdict rule with the numbers behind it, for one trial",
                       takes="sweep", example="prefopt explain quickstart 0003 --at best --verdicts overfit_z=3")
    reasoned.add_argument("trial", metavar="TRIAL", help="a trial's number, such as 3 or 0003")
    reasoned.add_argument("--at", choices=("best", "end"), default="end", help="at which evaluation (default: end)")
    reasoned.add_argument("--verdicts", action="append", default=[], metavar="THRESHOLD=VALUE",
                          help="judge with another threshold, such as overfit_z=3")
    replayed = command("replay", replay, text="what other schedulers would have cost and lost on recorded curves",
                       takes="nothing", example="prefopt replay quickstart --scheduler asha:standard")
    replayed.add_argument("tables", metavar="TABLE", nargs="+",
                          help="a sweep, or a .csv or .jsonl file of curves (trial, step, value, ...)")
    replayed.add_argument("--scheduler", action="append", metavar="KIND[:SETTING]",
                          help="asha:standard, asha_promotion:10%%/3, fixed:80, lockstep, hyperband, median, ... "
                               "(default: all of them)")
    replayed.add_argument("--slots", type=_number(1, 10**4), default=4, help="trials side by side (default 4)")
    replayed.add_argument("--orders", type=_number(1, 10**5), default=200,
                          help="random orders of arrival for each table (default 200)")
    replayed.add_argument("--within", choices=("loss", "sweep"), default="loss",
                          help="what a trial is compared with at a rung (default: its own loss)")
    drawn = command("figure", figure, text="draw what a sweep's trials stored, and keep it in its MLflow run",
                    takes="sweep", example="prefopt figure over-optimisation frontier")
    drawn.add_argument("kind", metavar="KIND", help="frontier (gold reward against KL), gold, paths, learning_rates "
                       "or bandit")


if __name__ == "__main__":
    sys.exit(main())
