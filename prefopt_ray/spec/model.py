"""SweepSpec: a checked sweep, and the questions the rest of the program asks it.

A SweepSpec that exists keeps every rule. It knows nothing of YAML text, trials that ran, or the machine.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, model_validator

from prefopt_ray.errors import Problem, SpecError
from prefopt_ray.losses.cards import LossCard, find_card
from prefopt_ray.spec.layers import UNREAD
from prefopt_ray.spec.rules import findings
from prefopt_ray.spec.sections import (
    Baseline,
    DataSpec,
    EvalSpec,
    GuardsSpec,
    ModelSpec,
    ObjectiveSpec,
    ResourcesSpec,
    SamplesSpec,
    SchedulerSpec,
    SearchSpec,
    Section,
    TrackingSpec,
    TrainingSpec,
    parse_storage,
)
from prefopt_ray.spec.space import LEARNING_RATE, Choices, Space, distinct_points, grid_points, loss_space, two_digits
from prefopt_ray.spec.steps import (
    amount_in_steps,
    evaluation_steps,
    full_length,
    micro_batch,
    rung_steps,
    sample_steps,
)
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
# The method everybody knows with its paper's beta.
DEFAULT_BASELINE = Baseline("sigmoid", {})

# What does not change any number of any trial.
_NOT_CONTENT = ("name", "storage", "tracking", "resources")


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
    objective: ObjectiveSpec = ObjectiveSpec()
    guards: GuardsSpec = GuardsSpec()
    resources: ResourcesSpec = ResourcesSpec()
    tracking: TrackingSpec = TrackingSpec()
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
                section = section[name]
            for name in unread.get(section[key], ()):
                section.pop(name, None)
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
    def trial_count(self) -> int:
        """Trials of the sweep, the baseline counted once."""
        if self.search.method != "grid":
            assert self.search.trials_per_loss is not None
            return 1 + self.search.trials_per_loss * len(self.search.losses)
        points = sum(int(distinct_points(space)) for space in self.loss_spaces().values())
        return points + (not self._baseline_is_in_grid())

    @property
    def is_one_point(self) -> bool:
        """The whole sweep is one trial: what `best` prints."""
        return self.search.method == "grid" and self.trial_count == 1

    # ---- one trial ----

    def rung_steps(self, total_steps: int) -> tuple[int, ...]:
        """Steps where ASHA decides: first rung, times `keep_one_in`, below the stop step. Empty without ASHA.

        `total_steps` is the full length of the schedule.
        """
        return self._rungs(total_steps) if self.scheduler.kind == "asha" else ()

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
        self, loss: str, values: Mapping[str, float], *, train_pairs: int, max_tokens_hint: int | None = None
    ) -> TrialConfig:
        """One trial in steps and numbers. `values` holds each of the loss's parameters and `learning_rate`.

        `max_tokens_hint`: tokens of the longest pair, where the data is shorter than `data.max_tokens`; it only
        decides `micro_batch_pairs: auto`. Raises SpecError if the values are not the loss's.
        """
        card = find_card(loss)
        _check_point(card, values)
        total = self.total_steps(train_pairs)
        return TrialConfig(
            loss=card.name,
            loss_params={name: float(values[name]) for name in card.param_names},
            learning_rate=float(values[LEARNING_RATE]),
            training=self._training(total, max_tokens_hint or self.data.max_tokens),
            evaluation=self._evaluation(total),
            adapter=AdapterConfig(**dict(self.model.adapter)),
            guards=GuardConfig(self.guards.diverged, self.guards.overfit, **self._drift_limit()),
            seed=self.training.seed,
        )

    def _training(self, total: int, max_tokens: int) -> TrainingConfig:
        training = self.training
        return TrainingConfig(
            total_steps=total,
            stop_step=self.stop_step(total),
            batch_pairs=training.batch_pairs,
            micro_batch_pairs=micro_batch(training, max_tokens),
            schedule=training.schedule,
            warmup_steps=amount_in_steps(training.warmup, total),
            optimizer=OptimizerConfig(**dict(training.optimizer)),
            max_grad_norm=training.max_grad_norm,
            gradient_checkpointing=training.gradient_checkpointing,
        )

    def _evaluation(self, total: int) -> EvaluationConfig:
        last, rungs = self.stop_step(total), self._rungs(total)
        decisions = {*self.rung_steps(total), *(s for s in (self.scheduler.stop_steps or {}).values() if s <= last)}
        samples = sample_steps(self.samples.at, rungs, total, last)
        return EvaluationConfig(
            steps=tuple(sorted({*evaluation_steps(self.eval.at, rungs, total, last), *decisions, *samples})),
            probe_pairs=self.eval.train_probe,
            sample_steps=samples,
            sample_prompts=self.samples.prompts,
            max_new_tokens=self.samples.max_new_tokens,
            sample_seed=self.samples.seed,
        )

    def _rungs(self, total: int) -> tuple[int, ...]:
        """What `rungs` means in `at`, also without ASHA: sweeps with and without it are evaluated at equal steps."""
        return rung_steps(self.scheduler, total, self.stop_step(total))

    def _drift_limit(self) -> dict[str, float]:
        return {"drift_limit_per_token": GOLD_DRIFT_LIMIT} if self.data.is_gold else {}

    def _space(self, card: LossCard, own: Mapping[str, Any]) -> Space:
        search = self.search
        kind = self.model.adapter.kind
        return loss_space(card, own, search.shared, adapter_kind=kind, grid=search.method == "grid")

    def _baseline_is_in_grid(self) -> bool:
        loss, values = self.baseline_values()
        space = self.loss_spaces().get(loss)
        return space is not None and all(_holds(space[name], value) for name, value in values.items())


def one_point_spec(
    spec: SweepSpec, loss: str, values: Mapping[str, float], *, stop_step: int, total_steps: int
) -> SweepSpec:
    """The spec that trains exactly one configuration again, to `stop_step` of a schedule of `total_steps`.

    Its baseline is the point itself, so a run of it is one trial; evaluations are at the sweep's own steps, so the
    selected step is met again.
    """
    plain = spec.to_dict()
    card = find_card(loss)
    _check_point(card, values)
    point = {name: float(values[name]) for name in (*card.param_names, LEARNING_RATE)}
    evaluation = spec._evaluation(total_steps)
    training = {key: value for key, value in plain["training"].items() if key not in ("epochs", "pairs")}
    plain["training"] = training | {"steps": total_steps, "stop_step": stop_step}
    plain["search"] = {
        "method": "grid",
        "losses": {card.name: point},
        "baseline": {"loss": card.name, **point},
        "seed": spec.search.seed,
    }
    plain["scheduler"] = {"kind": "none"}
    plain["eval"]["at"] = [step for step in evaluation.steps if step <= stop_step]
    plain["samples"]["at"] = [step for step in evaluation.sample_steps if step <= stop_step] or "never"
    plain["name"] = spec.name if spec.is_one_point else f"{spec.name[:75]}-best"
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
