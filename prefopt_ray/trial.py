"""What one trial is (TrialConfig), how it ends (EndState) and what it says on the way (Report).

Standard library only: these cross process borders, are stored as JSON and read by every layer.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class EndState(StrEnum):
    """How a trial ended. All of them stay visible in every table."""

    COMPLETED = "completed"
    STOPPED_EARLY = "stopped_early"
    STOPPED_OVERFIT = "stopped_overfit"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    STOPPED_BY_USER = "stopped_by_user"


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA on the named linears, `qlora` = the same on a base kept in 4 bits, or `none` = full fine-tuning."""

    kind: str = "lora"  # lora | qlora | none
    rank: int = 16
    alpha: float = 32
    target: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or SGD. Defaults are PyTorch's and TRL's, without weight decay (an adapter starts at zero)."""

    kind: str = "adamw"  # adamw | sgd
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0  # sgd only


@dataclass(frozen=True)
class TrainingConfig:
    """Lengths are optimizer steps here; the spec's epochs, pairs and percentages are already resolved."""

    total_steps: int  # the schedule's full length
    stop_step: int  # where training ends, <= total_steps
    batch_pairs: int = 64  # pairs per optimizer step
    # Pairs per forward; batch_pairs need not be a multiple. None = as many as the execution plan's token budget holds.
    micro_batch_pairs: int | None = None
    schedule: str = "constant"  # constant | linear | cosine, each after the warm-up
    warmup_steps: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    max_grad_norm: float = 1.0  # 0 = no clipping
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class EvaluationConfig:
    """When a trial is evaluated, and on how much."""

    steps: tuple[int, ...]  # sorted; always holds 0 and stop_step
    probe_pairs: int = 512  # fixed train pairs, scored like the select part
    sample_steps: tuple[int, ...] = ()  # subset of steps: completions are drawn from the policy there
    sample_prompts: int = 128
    max_new_tokens: int = 128
    sample_seed: int = 0
    # Whose checkpoints stay: the trial's own best, or all (seeds of one configuration stop at a common step).
    keep: str = "best"  # best | all
    objective: str = "eval/gain"  # the metric that ranks trials; an evaluation without it does not count

    @property
    def objective_name(self) -> str:
        """What lines and reasons call it: `gain`, `judge/win_lcb`."""
        return self.objective.removeprefix("eval/")


@dataclass(frozen=True)
class GuardConfig:
    """What a verdict does to a running trial (`stop` or `flag`) and the drift limit that is flagged."""

    diverged: str = "stop"
    broken: str = "flag"
    memorised: str = "flag"
    overfit: str = "flag"
    over_optimised: str = "flag"
    collapsed: str = "flag"
    displaced: str = "flag"
    drift_limit_per_token: float = 0.3  # nats per token on the policy's own samples


@dataclass(frozen=True)
class TrialConfig:
    """Everything that decides a trial's numbers, beside the model, the pairs and the reference."""

    loss: str  # full card name, never an alias
    loss_params: Mapping[str, float]  # exactly the parameters the card reads (beta, label_smoothing, ...)
    learning_rate: float
    training: TrainingConfig
    evaluation: EvaluationConfig
    adapter: AdapterConfig = AdapterConfig()
    guards: GuardConfig = GuardConfig()
    seed: int = 0  # derives adapter initialisation and data order

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrialConfig":
        training = dict(data["training"])
        optimizer = dict(training["optimizer"])
        optimizer["betas"] = tuple(optimizer["betas"])
        training["optimizer"] = OptimizerConfig(**optimizer)
        evaluation = dict(data["evaluation"])
        for key in ("steps", "sample_steps"):
            evaluation[key] = tuple(evaluation[key])
        adapter = dict(data["adapter"])
        if not isinstance(adapter["target"], str):
            adapter["target"] = tuple(adapter["target"])
        return cls(
            loss=data["loss"],
            loss_params=dict(data["loss_params"]),
            learning_rate=data["learning_rate"],
            training=TrainingConfig(**training),
            evaluation=EvaluationConfig(**evaluation),
            adapter=AdapterConfig(**adapter),
            guards=GuardConfig(**data["guards"]),
            seed=data["seed"],
        )

    def digest(self) -> str:
        """16 hex digits over every field."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """Short and readable, for tables and run names: `ipo_sum beta=0.1 lr=5e-06`."""
        params = " ".join(f"{name}={value:g}" for name, value in self.loss_params.items())
        return f"{self.loss} {params} lr={self.learning_rate:g}"


@dataclass(frozen=True)
class ExecutionPlan:
    """What else decides the bits: equal plan and equal seed give equal bits on CPU."""

    engine: str  # flat | plain
    device: str
    dtype: str
    attention: str
    threads: int
    reason: str = ""  # why this engine
    micro_batch_tokens: int = 2_048  # of one forward with gradients, where the trial names no number of pairs
    scoring_tokens: int = 2_048  # of one forward without gradients
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepPoint:
    """One optimizer step's training metrics."""

    step: int
    metrics: Mapping[str, float]


def pack_points(points: list[StepPoint]) -> bytes:
    """Per-step points as one bytes field, so that a report stays one small message."""
    return zlib.compress(json.dumps([[p.step, dict(p.metrics)] for p in points]).encode())


def unpack_points(packed: bytes) -> list[StepPoint]:
    return [StepPoint(step, metrics) for step, metrics in json.loads(zlib.decompress(packed))]


@dataclass(frozen=True)
class Verdict:
    """A trial's diagnosis: one headline, all flags, where it began, and the numbers that say so."""

    # diverged | broken | memorised | overfit | over_optimised | collapsed_rejected | likelihood_displaced | underfit
    # | healthy | inconclusive
    headline: str
    flags: tuple[str, ...] = ()
    onset_step: int | None = None
    evidence: str = ""


@dataclass(frozen=True)
class Report:
    """What a trial says at an evaluation, or when it ends. Metric values are finite floats."""

    step: int
    pairs_seen: int
    metrics: Mapping[str, float]
    objective: float  # gain at this evaluation; -1.0 when it is not valid
    best_so_far: float  # best gain after the first optimizer step; -1.0 before
    best_step: int  # -1 before the first valid evaluation
    verdict: Verdict
    verdict_at_best: Verdict
    points: bytes = field(default=b"", repr=False)  # pack_points of the optimizer steps since the report before
    end_state: EndState | None = None
    reason: str = ""  # why it ended, one line
    seconds: float = 0.0  # training and evaluation time of this trial so far
    evaluating_seconds: float = 0.0  # of them spent in evaluations, samples and their scoring
    nonfinite: int = 0  # steps and evaluations that gave a NaN or infinity; the first one ends the trial

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the per-step points."""
        data = asdict(self)
        del data["points"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        fields = dict(data)
        for key in ("verdict", "verdict_at_best"):
            fields[key] = Verdict(**{**fields[key], "flags": tuple(fields[key]["flags"])})
        fields["end_state"] = EndState(fields["end_state"]) if fields["end_state"] else None
        return cls(**fields)
