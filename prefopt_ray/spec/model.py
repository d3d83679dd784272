"""SweepSpec: a checked sweep, and the questions the rest of the program asks it.

A SweepSpec that exists keeps every rule. It knows nothing of YAML text, trials that ran, or the machine.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from prefopt_ray.errors import Problem, SpecError
from prefopt_ray.losses.cards import LossCard, find_card
from prefopt_ray.spec.evaluation_plan import MOST_PROBE, MOST_PROMPTS, Workload, fitted
from prefopt_ray.spec.layers import UNREAD
from prefopt_ray.spec.rules import findings
from prefopt_ray.spec.sections import (
    BudgetSpec,
    AUTO,
    RUNGS,
    Baseline,
    ConfirmSpec,
    DataSpec,
    EvalSpec,
    GuardsSpec,
    JudgeSpec,
    ModelSpec,
    ObjectiveSpec,
    ReplicatesSpec,
    ResourcesSpec,
    SamplesSpec,
    SchedulerSpec,
    SearchSpec,
    Secrets,
    Section,
    TrackingSpec,
    TrainingSpec,
    VerdictsSpec,
    parse_storage,
)
from prefopt_ray.spec.space import LEARNING_RATE, Choices, Space, distinct_points, grid_points, loss_space, two_digits
from prefopt_ray.spec.steps import (
    AUTO_EVALUATIONS,
    OPTIONAL_EVALUATIONS,
    amount_in_steps,
    evaluation_steps,
    full_length,
    middle_first,
    rung_steps,
    sample_steps,
)
from prefopt_ray.thresholds import Thresholds
from prefopt_ray.trial import (
    AdapterConfig,
    EvaluationConfig,
    GuardConfig,
    OptimizerConfig,
    TrainingConfig,
    TrialConfig,
)

# Gold completions have about 8 tokens, so the same drift of a whole completion is more per token.
GOLD_DRIFT_LIMIT = 0.5  # nats per token
# `objective.metric` as the metric of a report. A win rate counts by its lower bound: luck on few prompts ranks low.
OBJECTIVES = {"gain": EvaluationConfig.objective, "judge": "judge/win_lcb", "gold": "gold/win_lcb"}
# The method everybody knows with its paper's beta.
DEFAULT_BASELINE = Baseline("sigmoid", {})

# What does not change any number of any trial.
_NOT_CONTENT = ("name", "storage", "tracking", "resources", "engine", "secrets", "budget")


class SweepFields(Section):
    """The keys of a spec, each section valid in itself; only loading builds this, to collect findings."""

    # It names a folder, an MLflow experiment and a run on every system.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
    model: ModelSpec
    data: DataSpec
    training: TrainingSpec
    search: SearchSpec
    scheduler: SchedulerSpec = SchedulerSpec()
    eval: EvalSpec = EvalSpec()
    samples: SamplesSpec = SamplesSpec()
    judge: JudgeSpec | None = None
    objective: ObjectiveSpec = ObjectiveSpec()
    guards: GuardsSpec = GuardsSpec()
    verdicts: VerdictsSpec = VerdictsSpec()
    replicates: ReplicatesSpec | None = None
    confirm: ConfirmSpec | None = None
    resources: ResourcesSpec = ResourcesSpec()
    budget: BudgetSpec = BudgetSpec()
    # auto = the flat engine where it serves the model; both give the same numbers to rounding.
    engine: Literal["auto", "plain"] = "auto"
    tracking: TrackingSpec = TrackingSpec()
    # Environment variables that must have a value wherever trials run, such as HF_TOKEN; their values are never sent.
    secrets: Secrets = ()
    # Relative to where the command runs, not to the spec: a spec in a read-only place still has results.
    storage: Annotated[Path, PlainValidator(parse_storage), PlainSerializer(str), Field(validate_default=True)] = Path(
        "prefopt-results"
    )


class SweepSpec(SweepFields):
    """One sweep, checked. Build it with `load_spec`, `parse_spec` or `SweepSpec.from_dict`."""

    @model_validator(mode="after")
    def _keeps_every_rule(self) -> "SweepSpec":
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        broken = [Problem("spec", ".".join(f.path), "", f.rule, f.fix) for f in findings(sections)]
        if broken:
            raise SpecError(*broken)
        return self

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], *, folder: Path | None = None) -> "SweepSpec":
        """A spec written as a dict; relative paths start at `folder` (default: the current one). Raises SpecError."""
        from prefopt_ray.spec.load import parse_spec  # here: loading builds SweepSpec

        return parse_spec(mapping, folder=folder)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal spec: every default written out, no unread key."""
        plain = self.model_dump(by_alias=True, exclude_none=True)
        for (path, key), unread in UNREAD.items():
            section = plain
            for name in path:
                section = section.get(name, {})  # a section that is absent by default
            for name in unread.get(section.get(key), ()):
                section.pop(name, None)
        if self.replicates is not None:
            del plain["training"]["seed"]  # not read beside replicates.seeds
        for section, key in (("data", "columns"), ("search", "shared")):
            if not plain[section][key]:
                del plain[section][key]
        return plain

    def content_hash(self) -> str:
        """16 hex digits over what decides the trials' numbers: not name, storage, tracking, resources.

        Taken after defaults, aliases and card ranges are resolved, so a spec that says them hashes like one that
        leaves them out.
        """
        plain = {key: value for key, value in self.to_dict().items() if key not in _NOT_CONTENT}
        if self.judge is not None and self.judge.at == "end":
            del plain["judge"]  # it only looks at what was trained
        plain["data"] |= {name: self.data.part(name).model_dump() for name in ("train", "select", "test")}
        plain["data"] |= {"text": self.data.text_mode, "columns": None}
        spaces = {loss: {key: repr(domain) for key, domain in s.items()} for loss, s in self.loss_spaces().items()}
        plain["search"] |= {"losses": list(spaces.items()), "shared": None, "baseline": self.baseline_values()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def experiment(self) -> str:
        """MLflow's experiment."""
        return self.tracking.experiment or f"prefopt/{self.name}"

    # ---- search ----

    def loss_spaces(self) -> dict[str, Space]:
        """Per full loss name, in the spec's order: what each parameter and `learning_rate` may be."""
        return {find_card(loss).name: self._space(find_card(loss), own) for loss, own in self.search.losses.items()}

    def baseline_values(self) -> tuple[str, dict[str, float]]:
        """The baseline's full loss name and every value: as written, else the card's default.

        An unnamed learning rate is the geometric middle of the card's range (two digits), since a range is
        usual in its middle and tried at its ends.
        """
        baseline = self.search.baseline or DEFAULT_BASELINE
        card = find_card(baseline.loss)
        usual = card.learning_rate(self.model.adapter.kind)
        values = {param.name: param.default for param in card.params}
        values[LEARNING_RATE] = two_digits(math.sqrt(usual.low * usual.high))
        return card.name, {**values, **baseline.values}

    def grid(self) -> list[tuple[str, dict[str, float]]]:
        """Method grid: every (loss, values), in the spec's order. The baseline is not added."""
        return [(loss, point) for loss, space in self.loss_spaces().items() for point in grid_points(space)]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds of every configuration; the first seed's trial comes first."""
        return self.replicates.seeds if self.replicates is not None else (self.training.seed,)

    @property
    def trial_count(self) -> int:
        """Trials that the sweep may take: every configuration with every seed, and the confirmation.

        Fewer where further seeds are spared (`replicates.from`) or the baseline is itself among the `confirm.top`.
        """
        return self.configuration_count * len(self.seeds) + self.confirm_count

    @property
    def confirm_count(self) -> int:
        """Trials of the confirmation at most: the first `top` and the baseline, with every fresh seed."""
        if self.confirm is None:
            return 0
        return min(self.confirm.top + 1, self.configuration_count) * len(self.confirm.seeds)

    @property
    def configuration_count(self) -> int:
        """Configurations of the sweep, the baseline counted once, as many as the budget has trials for."""
        most = max(1, self.budget.trials // len(self.seeds)) if self.budget.trials is not None else None
        return self._searched_count if most is None else min(self._searched_count, most)

    @property
    def _searched_count(self) -> int:
        if self.search.method != "grid":
            assert self.search.trials_per_loss is not None
            return 1 + self.search.trials_per_loss * len(self.search.losses)
        points = sum(int(distinct_points(space)) for space in self.loss_spaces().values())
        return points + (not self._baseline_is_in_grid())

    @property
    def is_one_point(self) -> bool:
        """The whole sweep is one trial: what `best` prints."""
        return self.search.method == "grid" and self.trial_count == 1  # so no replicates and nothing to confirm

    @property
    def thresholds(self) -> Thresholds:
        """What verdicts compare with."""
        own = {name: value for name, value in dict(self.verdicts).items() if value is not None}
        task = {"drift_limit_per_token": GOLD_DRIFT_LIMIT} if self.data.is_gold else {}
        return Thresholds(**task | own)

    # ---- one trial ----

    def rung_steps(self, total_steps: int) -> tuple[int, ...]:
        """Steps where the scheduler decides: first rung, times `keep_one_in`, below the stop step. Empty without rungs.

        `total_steps` is the full length of the schedule.
        """
        return self._rungs(total_steps) if self.scheduler.has_rungs else ()

    def total_steps(self, train_pairs: int) -> int:
        """Optimizer steps of the whole schedule."""
        return full_length(self.training, train_pairs)

    def stop_step(self, total_steps: int) -> int:
        """Where training ends. Raises SpecError if `training.stop_step` lies beyond the schedule."""
        stop = self.training.stop_step or total_steps
        if stop > total_steps:
            rule = f"the schedule of this data has only {total_steps} steps"
            raise SpecError(Problem("spec", "training.stop_step", str(stop), rule, "lower it, or train longer"))
        return stop

    def trial_config(
        self, loss: str, values: Mapping[str, float], *, train_pairs: int, workload: Workload | None = None
    ) -> TrialConfig:
        """One trial in steps and numbers. `values` holds each of the loss's parameters and `learning_rate`.

        `workload` decides what `auto` means in `eval` and `samples`; without it they are at their fullest. Raises
        SpecError if the values are not the loss's.
        """
        card = find_card(loss)
        _check_point(card, values)
        total = self.total_steps(train_pairs)
        return TrialConfig(
            loss=card.name,
            loss_params={name: float(values[name]) for name in card.param_names},
            learning_rate=float(values[LEARNING_RATE]),
            training=self._training(total),
            evaluation=self.evaluation(total, workload),
            adapter=AdapterConfig(**dict(self.model.adapter)),
            guards=GuardConfig(**dict(self.guards), drift_limit_per_token=self.thresholds.drift_limit_per_token),
            seed=self.seeds[0],
        )

    def replicates_from(self, total_steps: int) -> int:
        """The step that a configuration's first seed must pass before the others start; 0 = they start together."""
        if self.replicates is None or self.replicates.from_ is None:
            return 0
        return min(self.stop_step(total_steps), max(1, amount_in_steps(self.replicates.from_, total_steps)))

    def _training(self, total: int) -> TrainingConfig:
        training = self.training
        return TrainingConfig(
            total_steps=total,
            stop_step=self.stop_step(total),
            batch_pairs=training.batch_pairs,
            micro_batch_pairs=None if training.micro_batch_pairs == AUTO else training.micro_batch_pairs,
            schedule=training.schedule,
            warmup_steps=amount_in_steps(training.warmup, total),
            optimizer=OptimizerConfig(**dict(training.optimizer)),
            max_grad_norm=training.max_grad_norm,
            gradient_checkpointing=training.gradient_checkpointing,
        )

    def evaluation(self, total: int, workload: Workload | None = None) -> EvaluationConfig:
        """When and on how much a trial is evaluated, on a schedule of `total` steps."""
        last, rungs = self.stop_step(total), self._rungs(total)
        at = AUTO_EVALUATIONS if self.eval.at == AUTO else self.eval.at
        decisions = {*self.rung_steps(total), *(s for s in (self.scheduler.stop_steps or {}).values() if s <= last)}
        decisions |= {self.replicates_from(total)}
        samples = sample_steps(self.samples.at, rungs, total, last)
        fullest = EvaluationConfig(
            steps=tuple(sorted({*evaluation_steps(at, rungs, total, last), *decisions, *samples})),
            probe_pairs=MOST_PROBE if self.eval.train_probe == AUTO else self.eval.train_probe,
            sample_steps=samples,
            sample_prompts=MOST_PROMPTS if self.samples.prompts == AUTO else self.samples.prompts,
            max_new_tokens=self.samples.max_new_tokens,
            sample_seed=self.samples.seed,
            keep="all" if self.replicates is not None else EvaluationConfig.keep,
            objective=OBJECTIVES[self.objective.metric],
        )
        if workload is None:
            return fullest
        quarters = evaluation_steps(OPTIONAL_EVALUATIONS, (), total, last) if self.eval.at == AUTO else ()
        needed = {*evaluation_steps((RUNGS,), rungs, total, last), *decisions, *samples}
        return fitted(
            fullest, workload, optional=middle_first([step for step in quarters if step not in needed]),
            probe=self.eval.train_probe == AUTO, prompts=self.samples.prompts == AUTO,
        )

    def _rungs(self, total: int) -> tuple[int, ...]:
        """What `rungs` means in `at`, also without ASHA: sweeps with and without it are evaluated at equal steps."""
        return rung_steps(self.scheduler, total, self.stop_step(total))

    def _space(self, card: LossCard, own: Mapping[str, Any]) -> Space:
        search = self.search
        kind = self.model.adapter.kind
        return loss_space(card, own, search.shared, adapter_kind=kind, grid=search.method == "grid")

    def _baseline_is_in_grid(self) -> bool:
        loss, values = self.baseline_values()
        space = self.loss_spaces().get(loss)
        return space is not None and all(_holds(space[name], value) for name, value in values.items())


def one_point_spec(
    spec: SweepSpec, loss: str, values: Mapping[str, float], *, stop_step: int, total_steps: int,
    evaluation: EvaluationConfig | None = None,
) -> SweepSpec:
    """The spec that trains exactly one configuration again, to `stop_step` of a schedule of `total_steps`.

    Its baseline is the point itself, so a run of it is one trial; evaluations are those of the sweep (`evaluation`,
    where `auto` was resolved on its data), so the selected step is met again.
    """
    plain = spec.to_dict()
    card = find_card(loss)
    _check_point(card, values)
    point = {name: float(values[name]) for name in (*card.param_names, LEARNING_RATE)}
    evaluation = evaluation or spec.evaluation(total_steps)
    training = {key: value for key, value in plain["training"].items() if key not in ("epochs", "pairs")}
    plain["training"] = training | {"steps": total_steps, "stop_step": stop_step, "seed": spec.seeds[0]}
    plain.pop("replicates", None)
    plain.pop("confirm", None)
    plain["search"] = {
        "method": "grid",
        "losses": {card.name: point},
        "baseline": {"loss": card.name, **point},
        "seed": spec.search.seed,
    }
    plain["scheduler"] = {"kind": "none"}
    plain["eval"]["at"] = [step for step in evaluation.steps if step <= stop_step]
    plain["eval"]["train_probe"] = evaluation.probe_pairs
    plain["samples"]["at"] = [step for step in evaluation.sample_steps if step <= stop_step] or "never"
    plain["samples"]["prompts"] = evaluation.sample_prompts
    plain["name"] = spec.name if spec.is_one_point else f"{spec.name[:75]}-best"
    return SweepSpec.from_dict(plain)


def confirmed_spec(spec: SweepSpec, searched: TrialConfig, *, length: int, seed: int) -> SweepSpec:
    """The spec of one run of the confirmation: from scratch, to exactly `length`, on `confirm.schedule` over it.

    `searched` is the configuration as the search trained it: warm-up and evaluations stay at the steps they had there.
    No guard but the one against divergence ends the run, since its length is chosen already.
    """
    assert spec.confirm is not None
    total, evaluation = searched.training.total_steps, searched.evaluation
    values = {**searched.loss_params, LEARNING_RATE: searched.learning_rate}
    plain = one_point_spec(
        spec, searched.loss, values, stop_step=length, total_steps=total, evaluation=evaluation
    ).to_dict()
    plain["training"] |= {
        "steps": length, "stop_step": length, "seed": seed, "schedule": spec.confirm.schedule,
        "warmup": min(searched.training.warmup_steps, length - 1),
    }
    plain["guards"] |= {name: "flag" for name, action in plain["guards"].items()
                        if name != "diverged" and action == "stop"}
    if evaluation.sample_steps:
        plain["samples"]["at"] = sorted({*(step for step in evaluation.sample_steps if step < length), length})
    return SweepSpec.from_dict(plain)


def _check_point(card: LossCard, values: Mapping[str, float]) -> None:
    expected = {*card.param_names, LEARNING_RATE}
    if set(values) != expected:
        rule = f"{card.name} takes {', '.join(sorted(expected))}"
        raise SpecError(Problem("configuration", card.name, ", ".join(sorted(values)) or "nothing", rule))
    for name, value in values.items():
        allowed = 0 < value < math.inf if name == LEARNING_RATE else card.param(name).allows(value)
        if not allowed:
            rule = "learning_rate must be > 0" if name == LEARNING_RATE else card.param(name).rule
            raise SpecError(Problem("configuration", f"{card.name}.{name}", f"{value:g}", rule))


def _holds(domain: Any, value: float) -> bool:
    return isinstance(domain, Choices) and value in domain.values
