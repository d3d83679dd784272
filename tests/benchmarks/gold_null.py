"""The null: one configuration repeated under other training seeds, dealt into sweeps in which nothing is better.

Each synthetic sweep is a real sweep folder: configurations and a baseline made of recorded trials, ranked on a random
select part, and scored on a test part that shares no pair with it. The program's own `finalists` and `find_answer` are
then asked whether anything beats the baseline. The learning rate is constant, so what a trial was after k steps is
what a confirmation of k steps would have made.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from benchmarks.gold_trials import RecordedTrial

from prefopt_ray.results.answer import EVALUATIONS_FILE, TEST_FILE, Answer, finalists, find_answer, to_confirm
from prefopt_ray.results.configurations import configuration_of
from prefopt_ray.results.ledger import CONFIRM, SEARCH, Ledger, read_sweep
from prefopt_ray.losses.cards import find_card
from prefopt_ray.measures.gain import calibrated_gain
from prefopt_ray.measures.metrics import margins
from prefopt_ray.train.evaluations import EvaluationLog
from prefopt_ray.trial import EndState, Report, Verdict

SELECT_PAIRS, TEST_PAIRS = 2000, 4000


@dataclass(frozen=True)
class Design:
    """How a sweep spends its trials. The baseline is one of the configurations."""

    name: str
    configurations: int = 9
    seeds: int = 1
    confirmed: int = 0  # so many, and the baseline, are trained again
    confirm_seeds: int = 0


DESIGNS = (
    Design("one seed each"),
    Design("three replicates", configurations=5, seeds=3),
    Design("one seed each, two confirmed with two fresh seeds", confirmed=2, confirm_seeds=2),
    Design("one seed each, two confirmed with three fresh seeds", confirmed=2, confirm_seeds=3),
)


@dataclass(frozen=True)
class NullSweep:
    """What one synthetic sweep claimed."""

    trials: tuple[int, ...]  # numbers of the recorded trials in it
    claimed: bool  # "better than the baseline", of the configuration
    adapter_claimed: bool  # of the adapter that came out of it
    difference: float | None  # winner - baseline on test, bits per pair; None when the baseline won


def null_sweeps(trials: Sequence[RecordedTrial], design: Design, *, sweeps: int) -> list[NullSweep]:
    """Synthetic sweeps of one design from the recorded null trials. Raises ValueError for too few of them."""
    needed = design.configurations * design.seeds + (design.confirmed + 1) * design.confirm_seeds
    if needed > len(trials):
        raise ValueError(f"{design.name}: needs {needed} trials, {len(trials)} are recorded")
    return [_one_sweep(trials, design, np.random.default_rng([number, needed])) for number in range(sweeps)]


def claim_interval(found: Sequence[NullSweep], trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the share of claims that knows that sweeps share trials.

    Trials are redrawn, and a sweep counts as often as the product of how often its trials were.
    """
    rng = np.random.default_rng(0)
    members = np.zeros((len(found), trials), dtype=bool)
    for row, sweep in zip(members, found):
        row[list(sweep.trials)] = True
    claims = np.array([sweep.claimed for sweep in found])
    shares = []
    for _ in range(1000):
        # Bayesian bootstrap: no trial's weight is zero, which would empty nearly every sweep.
        weights = np.exp(np.log(rng.exponential(size=trials)) @ members.T)
        shares.append(weights @ claims / weights.sum())
    low, high = np.percentile(shares, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


class _Dealer:
    """Deals recorded trials and pairs into one sweep folder, writing what the driver and the workers would have."""

    def __init__(self, folder: Path, trials: Sequence[RecordedTrial], rng: np.random.Generator) -> None:
        self.folder, self.dealt = folder, []
        self._trials, self._deck = trials, rng.permutation(len(trials)).tolist()
        pairs = rng.permutation(len(trials[0].evaluations.row_ids("select")))
        self._select, self._test = pairs[:SELECT_PAIRS], pairs[SELECT_PAIRS : SELECT_PAIRS + TEST_PAIRS]
        self._ledger = Ledger(folder / "ledger.jsonl")
        self._ledger.append("sweep", format=1, sweep_id="null", name="null", spec_hash="0", facts={"pairs": {}})
        self._recorded: dict[str, RecordedTrial] = {}

    def train(self, configuration: str, *, baseline: bool, role: str = SEARCH, steps: int | None = None) -> None:
        """The next recorded trial, as one seed of a configuration; a confirmation ends after `steps`."""
        index = self._deck.pop()
        trial, number = self._trials[index], len(self.dealt)
        self.dealt.append(index)
        name = configuration if role == SEARCH and configuration not in self._recorded else f"{configuration}-{number}"
        self._recorded[name] = trial
        config = trial.config
        if steps is not None:
            config = replace(config, training=replace(config.training, stop_step=steps))
        self._ledger.append(
            "trial", trial=name, number=number, baseline=baseline, config=config.to_dict(), role=role,
            values=dict(config.loss_params) | {"learning_rate": config.learning_rate}, configuration=configuration,
        )
        select = _subset(trial, self._select, "select")
        (self.folder / "trials" / name).mkdir(parents=True)
        select.save(self.folder / "trials" / name / EVALUATIONS_FILE)
        for report in _reports(trial, select, until=steps):
            self._ledger.append("report", trial=name, report=report.to_dict())
        self._ledger.append("end", trial=name, end_state=EndState.COMPLETED, reason="all steps")

    def score_finalists(self) -> Answer:
        """The test pass, and the answer."""
        sweep = read_sweep(self.folder)
        for finalist in finalists(sweep):
            step = configuration_of(sweep, finalist).best_step
            scored = _subset(self._recorded[finalist.trial_id], self._test, "test", steps=(step,))
            scored.save(self.folder / "trials" / finalist.trial_id / TEST_FILE)
            self._ledger.append("tested", trial=finalist.trial_id, step=step)
        self._ledger.close()
        return find_answer(read_sweep(self.folder))


def _one_sweep(trials: Sequence[RecordedTrial], design: Design, rng: np.random.Generator) -> NullSweep:
    with tempfile.TemporaryDirectory() as scratch:
        dealer = _Dealer(Path(scratch), trials, rng)
        for number in range(design.configurations):
            for _ in range(design.seeds):
                dealer.train(f"c{number}", baseline=number == 0)
        if design.confirmed:
            for chosen in to_confirm(read_sweep(dealer.folder), top=design.confirmed):
                for _ in range(design.confirm_seeds):
                    dealer.train(chosen.key, baseline=chosen.baseline, role=CONFIRM, steps=chosen.best_step)
        answer = dealer.score_finalists()
    over = answer.over_baseline
    return NullSweep(
        tuple(dealer.dealt), claimed=answer.beats_baseline, adapter_claimed=answer.adapter_beats_baseline,
        difference=None if over is None else over.mean,
    )


def _reports(trial: RecordedTrial, select: EvaluationLog, *, until: int | None) -> list[Report]:
    """The trial's reports as they would have been on this select part."""
    card, reports = find_card(trial.config.loss), []
    best, best_step = -1.0, -1
    for step in select.steps("select"):
        if step == 0 or (until is not None and step > until):
            continue
        gain = calibrated_gain(margins(select.stats("select", step), card), None).gain
        if gain > best:
            best, best_step = gain, step
        metrics = next(report for report in trial.reports if report.step == step).metrics
        reports.append(Report(
            step=step, pairs_seen=0, metrics=metrics, objective=gain, best_so_far=best, best_step=best_step,
            verdict=Verdict("healthy"), verdict_at_best=Verdict("healthy"),
        ))
    return reports


def _subset(trial: RecordedTrial, rows: np.ndarray, part: str, *, steps: Sequence[int] = ()) -> EvaluationLog:
    """Some rows of the recorded pool, as the per-pair file of a part."""
    pool = trial.evaluations
    arrays = {f"{part}/row_ids": pool.row_ids("select")[rows], f"{part}/groups": pool.groups("select")[rows]}
    for step in steps or pool.steps("select"):
        stats = pool.stats("select", step).map(lambda column: column[rows])
        arrays[f"{part}/tokens"] = np.stack([stats.chosen_tokens, stats.rejected_tokens], axis=1).astype(np.int32)
        arrays[f"{part}/reference"] = np.stack([stats.reference_chosen, stats.reference_rejected], axis=1)
        arrays[f"{part}/policy/{step:08d}"] = np.stack([stats.policy_chosen, stats.policy_rejected], axis=1)
    return EvaluationLog(arrays)
