"""A sweep from spec to answer on Ray: start or resume, run, score the finalists on test, write it all down.

The main thread watches and hears Ctrl-C; Tune runs in a second thread. One Ctrl-C writes a stop
command that every trial sees between two steps; Tune's own handling would not checkpoint them.
"""

import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray import tune

from prefopt_ray import __version__
from prefopt_ray.answer import TEST_FILE, Answer, find_answer, finalists, trial_folder
from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.engine.reference import Progress, stored_parts
from prefopt_ray.errors import InputError, PrefoptError, Problem, ResourceError, SweepError
from prefopt_ray.ledger import Ledger, SweepRecord, TrialRecord, clear_stop, read_sweep, request_stop, stop_requested
from prefopt_ray.pairs.tokens import SweepData
from prefopt_ray.prepare import Prepared, WorkerBlueprint, cache_folder, prepare
from prefopt_ray.report import answer_lines, leaderboard
from prefopt_ray.spec import SweepSpec, dump_spec, load_spec
from prefopt_ray.spec.sections import DEFAULT_PRESET, PRESETS, SchedulerSpec
from prefopt_ray.tracking.delivery import TrackingSettings
from prefopt_ray.tracking.operations import DatasetInfo
from prefopt_ray.tracking.runs import SweepIdentity, SweepSummary, SweepTracker, tracking_uri
from prefopt_ray.train.checkpoints import Checkpoints
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.trial import TrialConfig
from prefopt_ray.tuning.driver import MAX_PROCESS_DEATHS, SweepDriver
from prefopt_ray.tuning.rungs import FixedStops, NoStops, StopRule, SuccessiveHalving
from prefopt_ray.tuning.seams import DriverCallback, DriverScheduler, DriverSearcher
from prefopt_ray.tuning.search import Listed, Point, Proposer, Tpe, listed_points
from prefopt_ray.tuning.trainable import PreferenceTrainable

LEDGER, SPEC = "ledger.jsonl", "spec.yaml"
WATCH_S = 0.25  # how often the main thread looks
DELIVERY_S = 60.0  # how long the end of a sweep waits for the tracking server

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who watches a sweep: the terminal, or nobody."""

    def stage(self, name: str) -> Progress:
        """A long step before the trials begins; the returned function is told (done, total)."""
        ...

    def started(self, sweep: SweepRecord, spec: SweepSpec, notes: list[str]) -> None: ...

    def watch(self, sweep: SweepRecord) -> None:
        """Called several times a second while trials run."""
        ...

    def stopping(self) -> None: ...


def run_sweep(spec: SweepSpec, observer: Observer) -> SweepRecord:
    """Run a new sweep to its answer, or until Ctrl-C (then some trials are paused)."""
    _refuse_impossible(spec)
    prepared = prepare(spec, stage=observer.stage, device="cpu", threads=spec.resources.cpus_per_trial)
    sweep_id = secrets.token_hex(4)
    folder = spec.storage / f"{spec.name}-{sweep_id}"
    folder.mkdir(parents=True)
    (folder / SPEC).write_text(dump_spec(spec))
    sweep = SweepRecord(folder, sweep_id, spec.name, spec.content_hash(), _facts(prepared))
    ledger = Ledger(folder / LEDGER)
    ledger.append(
        "sweep", format=1, sweep_id=sweep_id, name=sweep.name, spec_hash=sweep.spec_hash, facts=sweep.facts
    )
    _write_drops(folder, prepared)
    try:
        return _session(spec, prepared, sweep, ledger=ledger, observer=observer)
    except InputError:
        if not sweep.trials:  # nothing was paid for: a wrong input leaves no empty sweep behind
            shutil.rmtree(folder)
        raise


def resume_sweep(folder: Path, observer: Observer) -> SweepRecord:
    """Continue a sweep from its ledger. Finished trials are not run again. Raises SweepError when the data changed."""
    sweep = read_sweep(folder)
    spec = load_spec(folder / SPEC)
    prepared = prepare(spec, stage=observer.stage, device="cpu", threads=spec.resources.cpus_per_trial)
    _require_same(sweep, spec, prepared)
    clear_stop(folder)
    return _session(spec, prepared, sweep, ledger=Ledger(folder / LEDGER), observer=observer)


def _session(
    spec: SweepSpec, prepared: Prepared, sweep: SweepRecord, *, ledger: Ledger, observer: Observer
) -> SweepRecord:
    _start_ray()
    resources = _trial_resources(spec)
    device = "cuda" if resources["gpu"] > 0 else "cpu"
    blueprint = replace(prepared.blueprint, device=device)
    blueprint = _with_reference(blueprint, prepared.loaded.data, spec, resources=resources, observer=observer)
    tracker = _tracker(spec, sweep, ledger)
    tracker.start(dump_spec(spec), spec.to_dict(), _datasets(prepared))
    try:
        driver = _driver(spec, prepared, sweep, ledger=ledger, tracker=tracker)
        observer.started(sweep, spec, list(prepared.loaded.warnings))
        shared = ray.put(blueprint)  # once per node
        _run_trials(shared, driver, spec, resources=resources, observer=observer)
        if stop_requested(sweep.folder):
            tracker.paused()
        else:
            _finish(shared, sweep, ledger=ledger, tracker=tracker, resources=resources, observer=observer)
    finally:
        undelivered = tracker.close(DELIVERY_S)
        ledger.close()
    if undelivered:
        log.warning("%d tracking operations are not delivered yet; they are kept and sent by `prefopt resume`", undelivered)
    return sweep


# -- trials ----------------------------------------------------------------------------------------


def _run_trials(
    blueprint: ray.ObjectRef, driver: SweepDriver, spec: SweepSpec, *, resources: dict[str, float], observer: Observer
) -> None:
    trainable = tune.with_resources(
        tune.with_parameters(PreferenceTrainable, open_worker=blueprint), resources
    )
    slots = _slots(resources, limit=spec.resources.max_concurrent)
    tuner = tune.Tuner(
        trainable,
        param_space={},
        tune_config=tune.TuneConfig(
            search_alg=DriverSearcher(driver), scheduler=DriverScheduler(driver), num_samples=-1, reuse_actors=True,
            max_concurrent_trials=slots,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(driver.sweep.folder), verbose=0, callbacks=[DriverCallback(driver)],
            failure_config=tune.FailureConfig(max_failures=MAX_PROCESS_DEATHS),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
        ),
    )
    failure: list[BaseException] = []
    done = threading.Event()

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread below
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=fit, name="tune", daemon=True).start()
    _watch(done, driver.sweep, observer=observer)
    if failure:
        raise failure[0]
    for trial in driver.sweep.trials.values():
        if trial.end_state is None and not trial.paused and not stop_requested(driver.sweep.folder):
            driver.failed(trial.trial_id, "its worker process could not be started or was lost")


def _watch(done: threading.Event, sweep: SweepRecord, *, observer: Observer) -> None:
    """Until Tune is done. The first Ctrl-C asks for a clean stop, the second is not held back.

    Waits for an event: a join that Ctrl-C interrupts makes Python 3.11 believe that the thread has ended.
    """
    while not done.is_set():
        try:
            done.wait(WATCH_S)
            observer.watch(sweep)
        except KeyboardInterrupt:
            if stop_requested(sweep.folder):
                raise
            request_stop(sweep.folder)
            observer.stopping()


def _driver(
    spec: SweepSpec, prepared: Prepared, sweep: SweepRecord, *, ledger: Ledger, tracker: SweepTracker
) -> SweepDriver:
    def make_config(point: Point) -> TrialConfig:
        return prepared.trial_config(point.loss, point.values)

    return SweepDriver(
        sweep, ledger=ledger, tracker=tracker, proposer=make_proposer(spec, sweep),
        rule=make_rule(spec, total_steps=spec.total_steps(prepared.train_pairs)), make_config=make_config,
        within_loss=spec.scheduler.within == "loss", stopping=lambda: stop_requested(sweep.folder),
    )


def make_proposer(spec: SweepSpec, sweep: SweepRecord) -> Proposer:
    """The spec's search, past what the sweep has already proposed."""
    loss, values = spec.baseline_values()
    baseline = Point(loss, values, baseline=True)
    search = spec.search
    if search.method == "tpe":
        earlier = [Point(t.config.loss, t.values, baseline=t.baseline) for t in sweep.trials.values()]
        return Tpe(
            spec.loss_spaces(), trials_per_loss=search.trials_per_loss, seed=search.seed, baseline=baseline,
            earlier=earlier,
        )
    points = listed_points(
        spec.loss_spaces(), method=search.method, trials_per_loss=search.trials_per_loss or 0, seed=search.seed,
        baseline=baseline,
    )
    return Listed(points, done=len(sweep.trials))


def make_rule(spec: SweepSpec, *, total_steps: int) -> StopRule:
    scheduler = spec.scheduler
    if scheduler.kind == "asha":
        return SuccessiveHalving(spec.rung_steps(total_steps), _keep_one_in(scheduler))
    if scheduler.kind == "fixed":
        return FixedStops(scheduler.stop_steps)
    return NoStops()


def _keep_one_in(scheduler: SchedulerSpec) -> int:
    return scheduler.keep_one_in or PRESETS[scheduler.preset or DEFAULT_PRESET].keep_one_in


# -- before and after the trials -------------------------------------------------------------------


def _with_reference(
    blueprint: WorkerBlueprint, data: SweepData, spec: SweepSpec, *, resources: dict[str, float], observer: Observer
) -> WorkerBlueprint:
    """The reference pass runs where trials run; the driver may have no accelerator."""
    cache = cache_folder(spec) / "reference"
    known = stored_parts(data, blueprint.reference_key(), cache=cache)
    if len(known) == len(data.parts):
        return replace(blueprint, parts=known)
    progress = observer.stage("reference pass")
    task = _reference_pass.options(num_cpus=resources["cpu"], num_gpus=resources["gpu"])
    for reference in task.remote(blueprint, data, cache):
        message = _value(reference)
        if isinstance(message, dict):
            return replace(blueprint, parts=message)
        progress(*message)
    raise RuntimeError("the reference pass ended without a result")


def _value(reference: ray.ObjectRef) -> Any:
    """What a task gave; an error that a person should read arrives as itself, not wrapped in Ray's traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PrefoptError):
            raise error.cause from error
        raise


@ray.remote(num_returns="streaming", max_retries=0)
def _reference_pass(
    blueprint: WorkerBlueprint, data: SweepData, cache: Path
) -> Iterator[tuple[int, int] | dict[str, ReferencedPairs]]:
    """(done, total) now and then, at last the parts."""
    latest: list[tuple[int, int]] = [(0, 1)]
    outcome: list[Any] = []

    def work() -> None:
        try:
            done = blueprint.with_reference(data, cache=cache, progress=lambda *point: latest.append(point))
            outcome.append(done.parts)
        except BaseException as error:  # noqa: BLE001 - raised in the task below
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        thread.join(WATCH_S)
        yield latest[-1]
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    yield outcome[0]


def _finish(
    blueprint: ray.ObjectRef, sweep: SweepRecord, *, ledger: Ledger, tracker: SweepTracker,
    resources: dict[str, float], observer: Observer,
) -> None:
    """Score the finalists once on test, export their adapters, rank, and write the answer."""
    chosen = finalists(sweep)
    todo = [t for t in chosen if t.trial_id not in sweep.tested]
    if todo:
        progress = observer.stage("test part")
        task = _score_finalists.options(num_cpus=resources["cpu"], num_gpus=resources["gpu"])
        for number, reference in enumerate(task.remote(blueprint, sweep.folder, todo), start=1):
            trial_id, step = _value(reference)
            sweep.tested[trial_id] = step
            ledger.append("tested", trial=trial_id, step=step)
            progress(number, len(todo))
    for trial in chosen:
        adapter = trial_folder(sweep, trial) / "adapter"
        if adapter.is_dir():
            tracker.adapter(trial.trial_id, adapter)
    answer = find_answer(sweep)
    tracker.rank([s.trial.trial_id for s in answer.standings])
    tracker.finish(_summary(sweep, answer))
    ledger.append("finished")
    sweep.finished = True


@ray.remote(num_returns="streaming", max_retries=0)
def _score_finalists(
    blueprint: WorkerBlueprint, folder: Path, trials: list[TrialRecord]
) -> Iterator[tuple[str, int]]:
    """Each trial's best checkpoint on the test part; its per-pair file and its adapter. Yields (trial id, step)."""
    worker = blueprint()
    test = worker.parts["test"]
    for trial in trials:
        home = folder / "trials" / trial.trial_id
        saved = Checkpoints(home / "checkpoints").load(trial.best_step)
        worker.engine.open(0, trial.config)
        worker.engine.load(0, saved.tensors)
        stored = EvaluationLog.of_parts({"test": test})
        stored.add("test", trial.best_step, worker.engine.score(0, test.tokens))
        stored.save(home / TEST_FILE)
        if trial.config.adapter.kind != "none":
            worker.engine.export(0, home / "adapter")
        yield trial.trial_id, trial.best_step


def _summary(sweep: SweepRecord, answer: Answer) -> SweepSummary:
    winner = answer.winner.trial_id if answer.winner else None
    return SweepSummary(winner, "\n".join(answer_lines(sweep, answer)), leaderboard(answer))


# -- Ray -------------------------------------------------------------------------------------------


def _start_ray() -> None:
    if ray.is_initialized():
        return
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # ledger and per-pair files hold everything
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is never read back
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }.items():
        os.environ.setdefault(name, value)
    for logger in ("ray.tune", "ray.train", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)


def _refuse_impossible(spec: SweepSpec) -> None:
    """Before anything is read or started, where trials will run on this machine. Raises ResourceError."""
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        _reservation(spec, cpus=float(os.cpu_count() or 1), gpus=float(torch.cuda.device_count()))


def _trial_resources(spec: SweepSpec) -> dict[str, float]:
    """What one trial reserves on the largest node. Raises ResourceError."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return _reservation(
        spec,
        cpus=max((node.get("CPU", 0.0) for node in nodes), default=0.0),
        gpus=max((node.get("GPU", 0.0) for node in nodes), default=0.0),
    )


def _reservation(spec: SweepSpec, *, cpus: float, gpus: float) -> dict[str, float]:
    """What one trial reserves on a node with so much. Raises ResourceError when that can never fit."""
    wanted = {"cpu": float(spec.resources.cpus_per_trial), "gpu": spec.resources.gpu_share(gpus_present=gpus > 0)}
    problems = []
    if wanted["cpu"] > cpus:
        problems.append(Problem(
            "spec", "resources.cpus_per_trial", f"{wanted['cpu']:g}", f"the largest node has {cpus:g} CPUs",
            "ask for fewer CPUs per trial, or connect to a larger cluster with RAY_ADDRESS",
        ))
    if wanted["gpu"] > gpus:
        seen = "" if torch.cuda.is_available() else "; torch sees no GPU here"
        problems.append(Problem(
            "spec", "resources.gpus_per_trial", f"{wanted['gpu']:g}", f"the largest node has {gpus:g} GPUs{seen}",
            "set gpus_per_trial: 0 to run on CPUs, or connect to a cluster with GPUs",
        ))
    if problems:
        raise ResourceError(*problems)
    return wanted


def _slots(resources: dict[str, float], *, limit: int | None) -> int:
    """How many trials fit at once, and at most `limit`."""
    total = ray.cluster_resources()
    fits = [int(total.get(name.upper(), 0.0) / share + 1e-6) for name, share in resources.items() if share > 0]
    return max(1, min([*fits, limit] if limit else fits))


# -- records ---------------------------------------------------------------------------------------


def _tracker(spec: SweepSpec, sweep: SweepRecord, ledger: Ledger) -> SweepTracker:
    def remember(key: str, run_id: str) -> None:
        trial = sweep.trials.get(key)
        if (trial.run_id if trial else sweep.run_id) == run_id:
            return
        if trial:
            trial.run_id = run_id
            ledger.append("tracked", trial=key, run_id=run_id)
        else:
            sweep.run_id = run_id
            ledger.append("tracked", run_id=run_id)

    settings = TrackingSettings(tracking_uri(spec.tracking.mlflow, spec.storage), spec.experiment)
    return SweepTracker(settings, SweepIdentity(sweep.sweep_id, sweep.name, sweep.folder), on_run_created=remember)


def _facts(prepared: Prepared) -> dict[str, Any]:
    loaded = prepared.loaded
    reasons: dict[str, int] = {}
    for drop in loaded.drops:
        reasons[drop.reason] = reasons.get(drop.reason, 0) + 1
    return {
        "prefopt": __version__,
        "data": loaded.data.digest,
        "pairs": {name: len(part) for name, part in loaded.data.parts.items()},
        "drops": reasons,
        "model": prepared.blueprint.model.model,
        "revision": prepared.blueprint.model.revision,
        "merged_adapters": list(prepared.blueprint.model.adapters),
        "warnings": list(loaded.warnings),
        "total_tokens": {name: int(part.longest.sum()) for name, part in loaded.data.parts.items()},
    }


def _write_drops(folder: Path, prepared: Prepared) -> None:
    drops = Ledger(folder / "drops.jsonl")
    for drop in prepared.loaded.drops:
        drops.append("drop", part=drop.part, row=drop.row, reason=drop.reason)
    drops.close()


def _datasets(prepared: Prepared) -> list[DatasetInfo]:
    return [
        DatasetInfo(name=Path(origin.source).name, source=origin.source, digest=origin.fingerprint, context=part,
                    split=origin.split)
        for part, origin in prepared.loaded.origins.items()
    ]


def _require_same(sweep: SweepRecord, spec: SweepSpec, prepared: Prepared) -> None:
    if sweep.facts["data"] != prepared.loaded.data.digest:
        raise SweepError(Problem(
            place=str(sweep.folder / SPEC), key="data", found=f"pairs with digest {prepared.loaded.data.digest[:12]}",
            rule=f"this sweep was started on pairs with digest {sweep.facts['data'][:12]}",
            fix="restore the data files or tokenizer as they were, or start a new sweep",
        ))
    if sweep.spec_hash != spec.content_hash():
        raise SweepError(Problem(
            place=str(sweep.folder / SPEC), key="", found="another spec", rule="this sweep's spec was changed",
            fix="restore spec.yaml, or run the changed spec as a new sweep",
        ))
