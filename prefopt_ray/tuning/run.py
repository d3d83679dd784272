"""A sweep from spec to answer on Ray: start or resume, run, score the finalists on test, write it all down.

The main thread watches and hears Ctrl-C; Tune runs in a second thread. One Ctrl-C writes a stop
command that every trial sees between two steps; Tune's own handling would not checkpoint them.
"""

import json
import logging
import secrets
import shutil
import threading
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune

from prefopt_ray import __version__
from prefopt_ray.results.answer import (
    Answer,
    finalists,
    find_answer,
    require_known_losses,
    test_gains,
    to_confirm,
    trial_folder,
)
from prefopt_ray.results.configurations import configuration_of, configurations
from prefopt_ray.engine.reference import Progress
from prefopt_ray.errors import InputError, Problem, SweepError
from prefopt_ray.results.judgement import Judgement
from prefopt_ray.judges.opening import check_judge
from prefopt_ray.results.ledger import (
    FORMAT,
    LEDGER_FILE,
    SESSION,
    Ledger,
    SweepRecord,
    clear_stop,
    read_events,
    read_sweep,
    request_stop,
    spent_budget,
    stop_requested,
)
from prefopt_ray.prepare import Prepared, WorkerBlueprint, cache_folder, prepare
from prefopt_ray.report.lines import answer_lines, leaderboard
from prefopt_ray.spec import SweepSpec, confirmed_spec, dump_spec, load_spec
from prefopt_ray.tracking.delivery import TrackingSettings
from prefopt_ray.tracking.operations import DatasetInfo
from prefopt_ray.tracking.runs import SweepIdentity, SweepSummary, SweepTracker, tracking_uri
from prefopt_ray.trial import TrialConfig
from prefopt_ray.tuning.budget import Meter, sessions_s
from prefopt_ray.tuning.driver import MAX_PROCESS_DEATHS, ConfirmRun, Replicas, SweepDriver
from prefopt_ray.tuning.judging import Ground, Question, judge_at_end, judge_sweep
from prefopt_ray.tuning.nodes import require_shared
from prefopt_ray.tuning.passes import reference_pass, score_on_test
from prefopt_ray.tuning.resources import refuse_impossible, slots, start_ray, trial_resources, tune_settings
from prefopt_ray.tuning.rungs import rule_of
from prefopt_ray.tuning.seams import DriverCallback, DriverScheduler, DriverSearcher
from prefopt_ray.tuning.search import Listed, Point, Proposer, Tpe, listed_points
from prefopt_ray.tuning.trainable import PreferenceTrainable

SPEC = "spec.yaml"
WATCH_S = 0.25  # how often the main thread looks
DELIVERY_S = 60.0  # how long the end of a sweep waits for the tracking server
INTERRUPTED_DELIVERY_S = 5.0

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


def new_sweep_id() -> str:
    return secrets.token_hex(4)


def run_sweep(spec: SweepSpec, observer: Observer, *, sweep_id: str | None = None) -> SweepRecord:
    """Run a new sweep to its answer, or until Ctrl-C (then some trials are paused)."""
    refuse_impossible(spec)
    if spec.judge is not None:
        check_judge(spec.judge)  # a wrong key should cost a second, not the night before it
    prepared = prepare(spec, stage=observer.stage, device="cpu", threads=spec.resources.cpus_per_trial)
    spec = prepared.spec
    sweep_id = sweep_id or new_sweep_id()
    folder = spec.storage / f"{spec.name}-{sweep_id}"
    folder.mkdir(parents=True)
    (folder / SPEC).write_text(dump_spec(spec))
    sweep = SweepRecord(folder, sweep_id, spec.name, spec.content_hash(), _facts(prepared))
    ledger = Ledger(folder / LEDGER_FILE)
    ledger.append(
        "sweep", format=FORMAT, sweep_id=sweep_id, name=sweep.name, spec_hash=sweep.spec_hash, facts=sweep.facts
    )
    _write_drops(folder, prepared)
    try:
        return _session(spec, prepared, sweep, ledger=ledger, observer=observer)
    except (InputError, KeyboardInterrupt):
        if not sweep.trials:  # nothing was paid for: no empty sweep is left behind
            shutil.rmtree(folder)
        raise


def resume_sweep(folder: Path, observer: Observer) -> SweepRecord:
    """Continue a sweep from its ledger. Finished trials are not run again. Raises SweepError when the data changed."""
    ledger = Ledger(folder / LEDGER_FILE)  # first: nobody else may be driving this sweep
    sweep = read_sweep(folder)
    require_known_losses(sweep)
    spec = load_spec(folder / SPEC)
    refuse_impossible(spec)
    if spec.judge is not None:
        check_judge(spec.judge)
    prepared = prepare(spec, stage=observer.stage, device="cpu", threads=spec.resources.cpus_per_trial)
    _require_same(sweep, spec, prepared)
    clear_stop(folder)
    return _session(spec, prepared, sweep, ledger=ledger, observer=observer)


def same_sweeps(spec: SweepSpec) -> list[SweepRecord]:
    """The sweeps of this very spec in its storage folder, the latest first."""
    found: list[tuple[float, SweepRecord]] = []
    for ledger in spec.storage.glob(f"{spec.name}-*/{LEDGER_FILE}"):
        try:
            sweep, stored = read_sweep(ledger.parent), load_spec(ledger.parent / SPEC).to_dict()
        except InputError as error:
            log.warning("%s is left out: %s", ledger.parent, error)
            continue
        if spec.model.revision is None:  # it was pinned to the commit of that day
            stored = {**stored, "model": {**stored["model"], "revision": None}}
        same = SweepSpec.from_dict(stored).content_hash() == spec.content_hash()
        if same and sweep.name == spec.name:
            found.append((ledger.stat().st_mtime, sweep))
    return [sweep for _, sweep in sorted(found, key=lambda pair: -pair[0])]


def unfinished_sweep(spec: SweepSpec) -> Path | None:
    """The latest sweep of this very spec in its storage folder, if it has no answer yet."""
    latest = next(iter(same_sweeps(spec)), None)
    return latest.folder if latest is not None and not latest.finished else None


def judge_again(folder: Path, question: Question, observer: Observer) -> Judgement:
    """Judge the saved checkpoints of a sweep; its ledger stays as it is. Raises JudgeError.

    The model is only opened for completions that are not stored yet.
    """
    sweep = read_sweep(folder)
    require_known_losses(sweep)
    spec = load_spec(folder / SPEC)

    @cache
    def ground() -> Ground:
        refuse_impossible(spec)
        prepared = prepare(spec, stage=observer.stage, device="cpu", threads=spec.resources.cpus_per_trial)
        _require_same(sweep, spec, prepared)
        start_ray()
        blueprint, reserved = _open_blueprint(spec, prepared, observer)
        return Ground(ray.put(blueprint), prepared, reserved)

    if question.judge is not None:
        check_judge(question.judge)
    return judge_sweep(sweep, spec, question, ground=ground, stage=observer.stage)


def _session(
    spec: SweepSpec, prepared: Prepared, sweep: SweepRecord, *, ledger: Ledger, observer: Observer
) -> SweepRecord:
    meter = Meter(spec.budget, sweep, earlier_s=sessions_s(read_events(sweep.folder / LEDGER_FILE)))
    ledger.append(SESSION)
    start_ray()
    require_shared(spec.storage)
    blueprint, reserved = _open_blueprint(spec, prepared, observer)
    tracker = _tracker(spec, sweep, ledger)
    tracker.start(dump_spec(spec), spec.to_dict(), _datasets(prepared))
    waits_s = DELIVERY_S
    try:
        driver = _driver(spec, prepared, sweep, ledger=ledger, tracker=tracker)
        observer.started(sweep, spec, list(prepared.warnings))
        shared = ray.put(blueprint)  # once per node
        with tune_settings():
            _run_trials(shared, driver, spec, reserved=reserved, observer=observer, meter=meter)
        if spent := spent_budget(sweep.folder):
            driver.end_all(spent)
            clear_stop(sweep.folder)
        if stop_requested(sweep.folder):
            tracker.paused()
        else:
            ground = Ground(shared, prepared, reserved)
            _finish(ground, sweep, spec, ledger=ledger, tracker=tracker, observer=observer)
    except KeyboardInterrupt:  # after the trials, or the second one: what is on disk is kept and resumed from
        tracker.paused()
        waits_s = INTERRUPTED_DELIVERY_S
    finally:
        undelivered = tracker.close(waits_s)
        ledger.close()
    if undelivered:
        log.warning("%d tracking operations are not delivered yet; they are kept and sent by `prefopt resume`", undelivered)
    return sweep


def _open_blueprint(
    spec: SweepSpec, prepared: Prepared, observer: Observer
) -> tuple[WorkerBlueprint, dict[str, float]]:
    """The blueprint of a worker where trials run, with the reference, and what each trial reserves."""
    reserved = trial_resources(spec)
    blueprint = replace(prepared.blueprint, device="cuda" if reserved["gpu"] > 0 else "cpu")
    opened = reference_pass(
        blueprint, prepared.loaded.data, cache=cache_folder(spec) / "reference", reserved=reserved,
        at_once=slots(reserved, limit=spec.resources.max_concurrent), progress=observer.stage("reference pass"),
    )
    return opened, reserved


# -- trials ----------------------------------------------------------------------------------------


def _run_trials(
    blueprint: ray.ObjectRef, driver: SweepDriver, spec: SweepSpec, *, reserved: dict[str, float], observer: Observer,
    meter: Meter,
) -> None:
    trainable = tune.with_resources(
        tune.with_parameters(PreferenceTrainable, open_worker=blueprint), reserved
    )
    tuner = tune.Tuner(
        trainable,
        param_space={},
        tune_config=tune.TuneConfig(
            search_alg=DriverSearcher(driver), scheduler=DriverScheduler(driver), num_samples=-1, reuse_actors=True,
            max_concurrent_trials=slots(reserved, limit=spec.resources.max_concurrent),
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
    _watch(done, driver.sweep, observer=observer, meter=meter)
    if failure:
        raise failure[0]
    for trial in list(driver.sweep.trials.values()):
        if trial.end_state is None and not trial.paused:
            if not stop_requested(driver.sweep.folder):
                driver.failed(trial.trial_id, "its worker process could not be started or was lost")
            else:  # between two orders: at a rung, where it waited for other seeds
                driver.paused(trial.trial_id)


def _watch(done: threading.Event, sweep: SweepRecord, *, observer: Observer, meter: Meter) -> None:
    """Until Tune is done. A budget that is used up asks for a clean stop. The first Ctrl-C asks for a clean stop, the second is not held back.

    Waits for an event: a join that Ctrl-C interrupts makes Python 3.11 believe that the thread has ended.
    """
    while not done.is_set():
        try:
            done.wait(WATCH_S)
            observer.watch(sweep)
            if not stop_requested(sweep.folder) and (spent := meter.used_up()):
                request_stop(sweep.folder, spent=spent)
        except KeyboardInterrupt:
            if stop_requested(sweep.folder):
                raise
            request_stop(sweep.folder)
            observer.stopping()


def _driver(
    spec: SweepSpec, prepared: Prepared, sweep: SweepRecord, *, ledger: Ledger, tracker: SweepTracker
) -> SweepDriver:
    total_steps = spec.total_steps(prepared.train_pairs)

    def make_config(point: Point, seed: int) -> TrialConfig:
        return replace(prepared.trial_config(point.loss, point.values), seed=seed)

    def plan(record: SweepRecord) -> list[ConfirmRun]:
        return confirm_runs(spec, prepared, record)

    return SweepDriver(
        sweep, ledger=ledger, tracker=tracker, proposer=make_proposer(spec, sweep),
        rule=rule_of(spec.scheduler, spec.rung_steps(total_steps)), make_config=make_config,
        replicas=Replicas(spec.seeds, spec.replicates_from(total_steps)),
        within_loss=spec.scheduler.within == "loss", stopping=lambda: stop_requested(sweep.folder),
        plan_confirmation=plan if spec.confirm is not None else None,
    )


def confirm_runs(spec: SweepSpec, prepared: Prepared, sweep: SweepRecord) -> list[ConfirmRun]:
    """Every run of the confirmation of a sweep whose search is over, the best configuration's first."""
    assert spec.confirm is not None
    runs = []
    for searched in to_confirm(sweep, top=spec.confirm.top):
        for seed in spec.confirm.seeds:
            point = confirmed_spec(spec, searched.config, length=searched.best_step, seed=seed)
            config = replace(prepared, spec=point).trial_config(searched.config.loss, searched.first.values)
            runs.append(ConfirmRun(searched, config))
    return runs


def make_proposer(spec: SweepSpec, sweep: SweepRecord) -> Proposer:
    """The spec's search, past what the sweep has already proposed."""
    loss, values = spec.baseline_values()
    baseline = Point(loss, values, baseline=True)
    search = spec.search
    if search.method == "tpe":
        earlier = [Point(c.config.loss, c.first.values, baseline=c.first.baseline) for c in configurations(sweep)]
        return Tpe(
            spec.loss_spaces(), trials_per_loss=search.trials_per_loss, seed=search.seed, baseline=baseline,
            earlier=earlier, most=spec.configuration_count,
        )
    points = listed_points(
        spec.loss_spaces(), method=search.method, trials_per_loss=search.trials_per_loss or 0, seed=search.seed,
        baseline=baseline,
    )
    return Listed(points[: spec.configuration_count], done=len(configurations(sweep)))


# -- before and after the trials -------------------------------------------------------------------


def _finish(
    ground: Ground, sweep: SweepRecord, spec: SweepSpec, *, ledger: Ledger, tracker: SweepTracker, observer: Observer,
) -> None:
    """Score the finalists once on test, export their adapters, have them judged, rank, and write the answer."""
    chosen = finalists(sweep)
    todo = [t for t in chosen if t.trial_id not in sweep.tested]
    if todo:
        progress = observer.stage("test part")
        steps = {trial.trial_id: configuration_of(sweep, trial).best_step for trial in todo}
        scored = score_on_test(ground.blueprint, sweep.folder, todo, steps=steps, reserved=ground.reserved)
        for number, (trial_id, problem) in enumerate(scored, start=1):
            if problem:
                sweep.untested[trial_id] = problem
                ledger.append("untested", trial=trial_id, reason=problem)
            else:
                sweep.tested[trial_id] = steps[trial_id]
                ledger.append("tested", trial=trial_id, step=sweep.tested[trial_id])
            progress(number, len(todo))
    for trial in chosen:
        adapter = trial_folder(sweep, trial) / "adapter"
        if adapter.is_dir():
            tracker.adapter(trial.trial_id, adapter)
    judge_at_end(sweep, spec, ground=ground, stage=observer.stage)
    answer = find_answer(sweep)
    tracker.rank([[trial.trial_id for trial in s.configuration.trials] for s in answer.standings])
    for trial_id, gain in test_gains(sweep).items():
        tracker.tested(trial_id, {"test_gain": gain.gain, "test_gain_low": gain.low, "test_gain_high": gain.high})
    tracker.finish(_summary(sweep, answer))
    ledger.append("finished")
    sweep.finished = True


def _summary(sweep: SweepRecord, answer: Answer) -> SweepSummary:
    winner = answer.winner.trial_id if answer.winner else None
    return SweepSummary(winner, "\n".join(answer_lines(sweep, answer)), leaderboard(answer))


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
        "weights": prepared.blueprint.weights,
        "reference_weights": prepared.blueprint.reference_weights,
        "merged_adapters": list(prepared.blueprint.model.adapters),
        "quantisation": prepared.blueprint.model.quantisation,
        "engine": f"{prepared.blueprint.choice.engine} ({prepared.blueprint.choice.reason})",
        "warnings": list(prepared.warnings),
        "total_tokens": {name: int(part.longest.sum()) for name, part in loaded.data.parts.items()},
    }


def _write_drops(folder: Path, prepared: Prepared) -> None:
    with (folder / "drops.jsonl").open("w", encoding="utf-8") as file:
        for drop in prepared.loaded.drops:
            file.write(json.dumps(asdict(drop), ensure_ascii=False) + "\n")


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
    for fact, what in (("weights", "model"), ("reference_weights", "reference model")):
        now = getattr(prepared.blueprint, fact)
        if sweep.facts[fact] != now:
            raise SweepError(Problem(
                place=prepared.blueprint.model.model, key="model", found=f"weights with digest {now[:12]}",
                rule=f"this sweep was started with a {what} of digest {sweep.facts[fact][:12]}",
                fix="restore the model files as they were, or start a new sweep",
            ))
    if sweep.spec_hash != spec.content_hash():
        raise SweepError(Problem(
            place=str(sweep.folder / SPEC), key="", found="another spec", rule="this sweep's spec was changed",
            fix="restore spec.yaml, or run the changed spec as a new sweep",
        ))
