"""The sections of a sweep spec: keys, types, defaults with their reasons. One section knows nothing of another.

Defaults that a trial's config has too are taken from `prefopt_ray.trial`, where they live.
"""

import difflib
import math
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, create_model
from pydantic_core import PydanticCustomError

from prefopt_ray.spec.layers import DATA_ENDINGS
from prefopt_ray.spec.space import Domain, DomainError, parse_domain, write_domain
from prefopt_ray.thresholds import Thresholds
from prefopt_ray.trial import AdapterConfig, EvaluationConfig, GuardConfig, OptimizerConfig, TrainingConfig

GOLD = "gold"  # the embedded language: the policy's name and the source of its pairs
BANDIT = "bandit"  # likewise the embedded bandit; `data.train.split` names its comparisons
EMBEDDED = (GOLD, BANDIT)
AUTO = "auto"  # as much as the data allows
RUNGS = "rungs"  # in `eval.at` and `samples.at`: the steps where the scheduler decides


def broken(rule: str, fix: str = "") -> PydanticCustomError:
    """What a validator here raises: a rule and a fix in the researcher's words."""
    return PydanticCustomError("rule", "{rule}", {"rule": rule, "fix": fix})


# ---- values that YAML writes in more than one way ----


def _amount(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?\s*%", value) and float(value[:-1]) <= 100:
        return value.replace(" ", "")
    raise broken("must be a share such as 3% (0% to 100%) or a whole number of steps")


def _positions(value: Any) -> tuple[int | str, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    try:
        return tuple(RUNGS if item == RUNGS else _amount(item) for item in items)
    except PydanticCustomError as error:
        raise broken("each is a share such as 25%, a step such as 40, or the word rungs") from error


def _auto_positions(value: Any) -> tuple[int | str, ...] | str:
    return value if value == AUTO else _positions(value)


def _first_rung(value: Any) -> int | str:
    if float(str(_amount(value)).rstrip("%")) == 0:
        raise broken("must be above 0% and at most 100%, or a step from 1", "10% is usual")
    return _amount(value)


def _seeds(value: Any) -> tuple[int, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
        raise broken("must be a list of seeds, whole numbers from 0", "write [1, 2, 3]")
    return tuple(items)


def _sample_positions(value: Any) -> tuple[int | str, ...]:
    return () if value == "never" else _positions(value)


def _texts(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise broken("must be a text or a list of texts")
    return tuple(items)


def _target(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) and value.strip() else _texts(value)


def _one_or_many(values: tuple[str, ...]) -> str | list[str]:
    return values[0] if len(values) == 1 else list(values)


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _domain(value: Any) -> Domain:
    try:
        return parse_domain(value)
    except DomainError as error:
        raise broken(error.rule, error.fix) from error


def _text_mode(value: Any) -> str:
    if isinstance(value, str) and (value in ("template", "plain") or value.endswith(".jinja")):
        return value
    raise broken("must be template, plain or a FILE.jinja", _meant(value, ("template", "plain")))


_TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "file")


def _tracking_uri(value: Any) -> str:
    if isinstance(value, str) and (value in ("sqlite", "databricks") or re.match(r"[a-z][a-z0-9+.-]*://\S", value)):
        scheme = re.split(r"[+:]", value)[0]
        # Any other may be a plugin's; a typing error would only show when nothing can be delivered.
        if scheme not in _TRACKING_SCHEMES and (meant := _meant(scheme, _TRACKING_SCHEMES)):
            raise broken(f"no tracking URI begins with {scheme}", meant)
        return value
    raise broken("must be `sqlite` (a file in the storage folder) or a tracking URI such as https://mlflow.example.org")


def _endpoint_url(value: Any) -> str:
    """Without user, query or fragment: that is where keys hide, and a spec is stored and shown."""
    try:
        parts = urllib.parse.urlsplit(value) if isinstance(value, str) else None
        plain = parts and parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        if plain and not (parts.query or parts.fragment) and (parts.port or 1):
            return value.rstrip("/").removesuffix("/chat/completions")
    except ValueError:
        pass  # an impossible port or address: the same rule says what is right
    rule = "must be an http or https address without user, password or query"
    raise broken(rule, "write https://api.openai.com/v1; the key comes from the variable that key_env names")


def _key_env(value: Any) -> str:
    # No hyphen: a key pasted here by mistake has one, a variable's name never has.
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", value):
        return value
    raise broken("must be the name of an environment variable, never the key itself", "write JUDGE_KEY")


def _function(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"(\w+(\.\w+)*|\S.*\.py):\w+(\.\w+)*", value):
        return value
    raise broken("must be package.module:function or FILE.py:function", "write judges.py:score")


def _not_blank(value: str) -> str:
    if not value.strip():
        raise broken("must not be empty")
    return value


def _auto_or_count(value: Any) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise broken("must be auto or a whole number, 1 or more")


def _auto_or_share(value: Any) -> float | str:
    if value == "auto":
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise broken("must be auto, 0, a fraction such as 0.5, or a number of GPUs")


def _duration(value: Any) -> float:
    """Seconds."""
    written = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([hms])", value) if isinstance(value, str) else None
    seconds = float(written[1]) * {"h": 3600, "m": 60, "s": 1}[written[2]] if written else 0.0
    if not 0 < seconds < 1e9:
        raise broken("must be hours, minutes or seconds above zero", "write 20h, 90m or 45s")
    return seconds


def _names_of_secrets(value: Any) -> tuple[str, ...]:
    """A value in place of a name is not repeated in the message."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise broken("must be names of environment variables", "write [HF_TOKEN]")
    if not all(re.fullmatch(r"[A-Z][A-Z0-9_]{0,99}", name) for name in names):
        raise broken("must be names of environment variables in capitals, never their values", "write [HF_TOKEN]")
    return tuple(dict.fromkeys(names))


def parse_storage(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise broken("must be a folder")
    if "://" in str(value):
        raise broken("storage in the cloud is known, but not supported yet", "name a folder; NFS works")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise broken("there is no user of this name: ~ is followed by / or by a user", "name a folder") from error


def _stop_steps(value: Any) -> dict[int, int]:
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        raise broken("must list the stop steps in trial order, or map trial numbers to them", "write {0: 320, 1: 80}")
    steps = {}
    for trial, step in value.items():
        is_step = isinstance(step, int) and not isinstance(step, bool) and step >= 1
        if not is_step or not re.fullmatch(r"[0-9]{1,9}", str(trial)):
            raise broken("trial numbers start at 0 (the baseline), steps at 1", "write {0: 320, 1: 80}")
        if int(trial) in steps:
            raise broken(f"trial {int(trial)} has two stop steps", "keep one of them")
        steps[int(trial)] = step
    return steps


@dataclass(frozen=True)
class OtherModel:
    """A reference that is not the policy."""

    model: str
    adapter: str | None = None


def _reference(value: Any) -> str | OtherModel:
    if value in ("start", "base"):
        return value
    if isinstance(value, OtherModel):
        return value
    is_other = isinstance(value, Mapping) and "model" in value and set(value) <= {"model", "adapter"}
    if is_other and all(isinstance(text, str) and text.strip() for text in value.values()):
        return OtherModel(**value)
    rule = "must be start (the policy at step 0), base (before start_adapter) or {model: ..., adapter: ...}"
    raise broken(rule, _meant(value, ("start", "base")))


def _write_reference(value: str | OtherModel) -> str | dict[str, str]:
    if isinstance(value, str):
        return value
    return {"model": value.model} | ({"adapter": value.adapter} if value.adapter else {})


@dataclass(frozen=True)
class Baseline:
    """What every trial is compared with; `values` may leave parameters to the card."""

    loss: str
    values: Mapping[str, float]


# What TRL and its users call a setting that is a part of the loss's name here.
DIVERGENCE_KEYS = ("divergence", "f_divergence", "f_divergence_type")
DIVERGENCE_RULE = "the divergence is a part of the loss's name: <loss>:forward_kl, <loss>:js or <loss>:alpha"


def divergence_fix(loss: str, written: Any) -> str:
    """How `sigmoid: {divergence: js}` is written."""
    name = str(written).removesuffix("_divergence")
    if name == "reverse_kl":
        return f"remove it: {loss} alone has the reverse KL"
    return f"write the loss as {loss}:{name if name in ('forward_kl', 'js', 'alpha') else 'js'}"


def _baseline(value: Any) -> Baseline:
    if isinstance(value, Baseline):
        return value
    fix = "write {loss: sigmoid, beta: 0.1, learning_rate: 5e-6}, or leave it out for DPO with usual values"
    if not isinstance(value, Mapping) or not isinstance(value.get("loss"), str):
        raise broken("every sweep has a baseline: a loss and its values", fix)
    numbers = {name: number for name, number in value.items() if name != "loss"}
    for name, number in numbers.items():
        if name in DIVERGENCE_KEYS:
            raise broken(DIVERGENCE_RULE, divergence_fix(value["loss"], number))
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise broken(f"{name} of a baseline is one finite number", fix)
    return Baseline(value["loss"], {name: float(number) for name, number in numbers.items()})


def _write_baseline(baseline: Baseline) -> dict[str, Any]:
    return {"loss": baseline.loss, **baseline.values}


def _meant(value: Any, valid: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(value), valid, n=1)
    return f"did you mean {close[0]}?" if close else ""


Amount = Annotated[int | str, PlainValidator(_amount)]
Seeds = Annotated[tuple[int, ...], PlainValidator(_seeds), PlainSerializer(list)]
AutoPositions = Annotated[
    tuple[int | str, ...] | str, PlainValidator(_auto_positions), PlainSerializer(lambda at: at if at == AUTO else list(at))
]
AutoCount = Annotated[int | str, PlainValidator(_auto_or_count)]
Duration = Annotated[float, PlainValidator(_duration), PlainSerializer(lambda seconds: f"{seconds:g}s")]
Secrets = Annotated[tuple[str, ...], PlainValidator(_names_of_secrets), PlainSerializer(list)]
Texts = Annotated[tuple[str, ...], PlainValidator(_texts), PlainSerializer(_one_or_many)]
SearchDomain = Annotated[Domain, PlainValidator(_domain), PlainSerializer(write_domain)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_not_blank)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
SCORE_COLUMNS = ("chosen_score", "rejected_score")
# role -> column of the source; scores are read only where they are named
Columns = dict[Literal["prompt", "chosen", "rejected", "system", "chosen_score", "rejected_score"], Text]


class Section(BaseModel):
    """Unknown keys are refused, nothing is converted (`"16"` is not 16), values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# ---- the sections ----


class AdapterSpec(Section):
    """What is trained: a LoRA on some linears (`qlora`: of a base kept in 4 bits), or (`none`) every weight."""

    kind: Literal["lora", "qlora", "none"] = AdapterConfig.kind
    rank: Count = AdapterConfig.rank
    alpha: Annotated[float, Field(gt=0)] = float(AdapterConfig.alpha)
    target: Annotated[str | tuple[str, ...], PlainValidator(_target), PlainSerializer(_plain)] = AdapterConfig.target


class ModelSpec(Section):
    """The policy, what it starts from and what it is compared with."""

    policy: Text  # hub id, local folder, or an embedded task: `gold`, `bandit`
    revision: Text | None = None  # hub ids only; absent = the newest, whose commit is recorded
    # The policy at step 0 is the reference of every published recipe: losses then start at their known L0.
    reference: Annotated[str | OtherModel, PlainValidator(_reference), PlainSerializer(_write_reference)] = "start"
    start_adapter: Text | None = None  # merged in float32 before the sweep
    adapter: AdapterSpec = AdapterSpec()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # as most published checkpoints are stored


class PartSpec(Section):
    """One of train, select, test: a source of its own, another split of train's source, or carved out of train."""

    source: Text | None = None  # hub id, local file or folder, or an embedded task: `gold`, `bandit`
    from_: Annotated[Literal["train"] | None, Field(alias="from")] = None
    revision: Text | None = None
    split: Text | None = None
    data_dir: Texts | None = None
    files: Texts | None = None
    pairs: Count | None = None  # absent = all
    columns: Columns | None = None  # absent = data.columns
    flipped: Annotated[float, Field(gt=0, lt=0.5)] | None = None  # gold train pairs: turn this share of labels around

    def origin(self) -> tuple[Any, ...]:
        """What decides which rows are read."""
        return self.source, self.revision, self.split or "train", self.data_dir, self.files

    @property
    def is_local_file(self) -> bool:
        return self.source is not None and self.source.endswith(DATA_ENDINGS)


# An accuracy from 1000 pairs is known to +-3 points (95 %): with fewer, most configurations cannot be told
# apart. A small data set names its own, smaller number.
CARVED_PAIRS = 1000


class DataSpec(Section):
    """Preference pairs in three parts that share no prompt."""

    train: PartSpec
    select: PartSpec | None = None
    test: PartSpec | None = None
    # Absent = template, since the policies people tune are chat models; plain for the embedded tasks, which have no turns.
    text: Annotated[str | None, PlainValidator(_text_mode)] = None
    max_tokens: Annotated[int, Field(ge=8)] = 2048  # as SimPO's UltraFeedback recipes (arXiv:2405.14734)
    columns: Columns = {}

    @property
    def is_gold(self) -> bool:
        return self.train.source == GOLD

    @property
    def is_embedded(self) -> bool:
        return self.train.source in EMBEDDED

    @property
    def text_mode(self) -> str:
        return self.text or ("plain" if self.is_embedded else "template")

    def part(self, name: Literal["train", "select", "test"]) -> PartSpec:
        """The part with everything it leaves to train or to `data.columns` filled in.

        A part without a source reads train's: its source, revision, data_dir and files. Split and pairs are its own.
        """
        written: PartSpec | None = getattr(self, name)
        if written is None:
            written = PartSpec(pairs=CARVED_PAIRS) if self.is_embedded else _carved()
        columns = written.columns if written.columns is not None else dict(self.columns)
        if written.source is not None or written.from_ is not None:
            return written.model_copy(update={"columns": columns})
        inherited = {key: getattr(self.train, key) for key in ("source", "revision", "data_dir", "files")}
        own = {key: getattr(written, key) for key in inherited if getattr(written, key) is not None}
        return written.model_copy(update={**inherited, **own, "columns": columns})


def _carved() -> PartSpec:
    return PartSpec.model_validate({"from": "train", "pairs": CARVED_PAIRS})


class OptimizerSpec(Section):
    """AdamW, or SGD (betas and eps belong to the one, momentum to the other)."""

    kind: Literal["adamw", "sgd"] = OptimizerConfig.kind
    betas: Annotated[tuple[float, float], Field(strict=False), PlainSerializer(list)] = OptimizerConfig.betas
    eps: Annotated[float, Field(gt=0)] = OptimizerConfig.eps
    weight_decay: Annotated[float, Field(ge=0)] = OptimizerConfig.weight_decay
    momentum: Annotated[float, Field(ge=0, lt=1)] = OptimizerConfig.momentum


class TrainingSpec(Section):
    """How long and in what steps; the full length of the schedule is exactly one of epochs, pairs, steps."""

    epochs: Annotated[float | None, Field(gt=0, le=10_000)] = None  # above it a slip: 1e4 for 1e-4
    pairs: Count | None = None
    steps: Count | None = None
    stop_step: Count | None = None  # stop there though the schedule runs to the full length
    batch_pairs: Count = TrainingConfig.batch_pairs
    micro_batch_pairs: Annotated[int | str, PlainValidator(_auto_or_count)] = "auto"  # pairs per forward pass
    # Unfinished decay makes early rungs unfair: a constant rate compares trials at any step.
    schedule: Literal["constant", "linear", "cosine"] = TrainingConfig.schedule
    warmup: Amount = "3%"  # of the full length, as in the published sweeps (arXiv:2502.01237)
    optimizer: OptimizerSpec = OptimizerSpec()
    max_grad_norm: Annotated[float, Field(ge=0)] = TrainingConfig.max_grad_norm
    gradient_checkpointing: bool = TrainingConfig.gradient_checkpointing
    seed: Seed = 0  # of every trial: adapter initialisation and data order


LossSpaces = dict[str, dict[str, SearchDomain]]


class SearchSpec(Section):
    """Which losses, over which values, drawn how."""

    method: Literal["grid", "random", "tpe"] = "random"  # covers any number of axes with the trials one can afford
    trials_per_loss: Count | None = None
    losses: Annotated[LossSpaces, Field(min_length=1)]
    shared: dict[str, SearchDomain] = {}
    baseline: Annotated[Baseline | None, PlainValidator(_baseline), PlainSerializer(_write_baseline)] = None
    seed: Seed = 0


@dataclass(frozen=True)
class Preset:
    """Keep the best 1 in `keep_one_in` at each rung; the first rung is this share of the budget."""

    keep_one_in: int
    first_rung: Fraction


PRESETS = {
    "conservative": Preset(2, Fraction(1, 4)),
    "standard": Preset(3, Fraction(1, 9)),
    "aggressive": Preset(4, Fraction(1, 16)),
}
# First rung at 11 %: under Adam the betas do not differ before about a tenth of the budget.
DEFAULT_PRESET = "standard"


class SchedulerSpec(Section):
    """Which trials stop early: at rungs, nobody, or at given steps (to compare with).

    `asha` stops a trial that is behind those before it at a rung. `asha_promotion` pauses it, and calls it back once
    others make it one of the best (arXiv:1810.05934, Algorithm 2). `lockstep` pauses all until a rung is whole.
    """

    # asha leaves no process idle and a stopped sweep has finished trials; docs/guides/schedulers.md has the numbers.
    kind: Literal["asha", "asha_promotion", "lockstep", "none", "fixed"] = "asha"
    preset: Literal["conservative", "standard", "aggressive"] | None = None
    first_rung: Annotated[int | str | None, PlainValidator(_first_rung)] = None
    keep_one_in: Annotated[int | None, Field(ge=2)] = None
    within: Literal["loss", "sweep"] = "loss"  # losses learn at different speeds: compare like with like
    stop_steps: Annotated[dict[int, int] | None, PlainValidator(_stop_steps)] = None  # fixed: trial number -> step

    @property
    def has_rungs(self) -> bool:
        return self.kind in ("asha", "asha_promotion", "lockstep")

    @property
    def factor(self) -> int:
        """About one in so many is kept at a rung."""
        return self.keep_one_in or PRESETS[self.preset or DEFAULT_PRESET].keep_one_in


class EvalSpec(Section):
    """When a trial is evaluated: step 0, about 1 %, every rung and the last step always are."""

    # auto = quarters for the course, as far as evaluating stays below a quarter of a trial's cost.
    at: AutoPositions = "auto"
    train_probe: AutoCount = "auto"  # train pairs scored each time; auto = 512, or fewer where those cost too much


class SamplesSpec(Section):
    """When completions are drawn from the policy (for drift, length, entropy), and how many."""

    at: Annotated[
        tuple[int | str, ...], PlainValidator(_sample_positions), PlainSerializer(lambda at: list(at) or "never")
    ] = (RUNGS,)
    prompts: AutoCount = "auto"  # auto = 128, or fewer where those cost too much
    max_new_tokens: Count = EvaluationConfig.max_new_tokens
    seed: Seed = EvaluationConfig.sample_seed


class PriceSpec(Section):
    """US dollars per million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class EndpointSpec(Section):
    """A chat model behind an OpenAI-compatible address that says which of two answers is better."""

    url: Annotated[str, PlainValidator(_endpoint_url)]  # up to /v1; /chat/completions is appended
    model: Text
    # The name of an environment variable; absent = the server wants no key. The key itself is written nowhere.
    key_env: Annotated[str | None, PlainValidator(_key_env)] = None
    template: Text | None = None  # a text file with {prompt}, {a} and {b}; absent = MT-bench's (arXiv:2306.05685)
    request: dict[str, Any] = {"temperature": 0}  # sent as it is, beside model and messages
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 5  # after 429, 5xx and timeouts, each wait twice the last
    concurrency: Count = 8
    max_calls: Count = 20_000  # of one judging; 4 finalists, baseline and reference on 512 prompts are 15,360
    max_usd: Annotated[float | None, Field(gt=0)] = None
    usd_per_million_tokens: PriceSpec | None = None


class JudgeSpec(Section):
    """Who compares completions, besides the gain on pairs: exactly one of reward_model, callable, endpoint."""

    reward_model: Text | None = None  # hub id or folder of a sequence classifier with one output
    callable: Annotated[str | None, PlainValidator(_function)] = None  # package.module:function or FILE.py:function
    endpoint: EndpointSpec | None = None
    at: Literal["end", "rungs"] = "end"  # rungs: also in every trial, wherever completions are sampled
    top: Count = 4  # finalists judged at the end, besides the baseline
    prompts: Count = 512  # a win rate from so many is known to +-4 points
    time_limit_s: Annotated[float, Field(gt=0)] = 120.0  # at rungs, per evaluation: a slow judge must not hold a trial


class ObjectiveSpec(Section):
    """What ranks trials: the calibrated gain compares losses and betas on pairs, a judge or the gold reward on
    completions; drift beyond the limit is flagged."""

    # judge, gold: the lower 95 % bound of the win rate against the reference, on the policy's own completions.
    metric: Literal["gain", "judge", "gold"] = "gain"
    drift_limit: Literal["flag"] = "flag"


Guard = Literal["stop", "flag"]


class GuardsSpec(Section):
    """What a verdict does to a running trial."""

    diverged: Guard = GuardConfig.diverged
    broken: Guard = GuardConfig.broken
    memorised: Guard = GuardConfig.memorised
    overfit: Guard = GuardConfig.overfit
    over_optimised: Guard = GuardConfig.over_optimised
    collapsed: Guard = GuardConfig.collapsed  # the verdict collapsed_rejected
    displaced: Guard = GuardConfig.displaced  # the verdict likelihood_displaced


def _threshold(name: str, default: int | float) -> Any:
    """A field of the section `verdicts`: a count from 1, a share, or a positive number; with the default's own sign."""
    if isinstance(default, int):
        return Annotated[int, Field(ge=1)], default
    if name.endswith(("_frac", "_accuracy", "_decay")):
        return Annotated[float, Field(ge=0, le=1)], default
    if default < 0:
        return Annotated[float, Field(lt=0)], default
    return Annotated[float, Field(ge=0)], default


# What each verdict compares with: the fields of Thresholds, where each has its reason.
VerdictsSpec = create_model(
    "VerdictsSpec",
    __base__=Section,
    **{field.name: _threshold(field.name, field.default) for field in fields(Thresholds)}
    # Absent = as the task: the gold language's completions are short.
    | {"drift_limit_per_token": (Annotated[float, Field(ge=0)] | None, None)},
)


class ResourcesSpec(Section):
    """What one trial takes. Nothing here changes a trial's numbers beyond rounding."""

    cpus_per_trial: Count = 1
    # auto = one GPU where the cluster has any, none where it has none.
    gpus_per_trial: Annotated[float | str, PlainValidator(_auto_or_share)] = "auto"
    trials_per_gpu: Count = 1
    max_concurrent: Count | None = None  # absent = as many as fit

    def gpu_share(self, *, gpus_present: bool) -> float:
        """GPUs (or the fraction of one) that a trial reserves."""
        whole = float(gpus_present) if isinstance(self.gpus_per_trial, str) else self.gpus_per_trial
        return whole / self.trials_per_gpu


class BudgetSpec(Section):
    """What a sweep may cost at most. Then what runs stops between two steps, and the answer is made of what there is."""

    gpu_hours: Annotated[float, Field(gt=0)] | None = None  # of trials, each counted by what it reserves
    wall_clock: Duration | None = None  # seconds in all sessions; written 20h, 90m or 45s
    trials: Count | None = None  # of the search; a configuration with several seeds is several

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name, value in dict(self).items() if value is not None}


class ReplicatesSpec(Section):
    """The seeds that every configuration is trained with; it is ranked and stopped as the mean over them."""

    seeds: Seeds
    # How far the first seed gets before the others start. Absent = they start together, and no rung is decided by
    # one seed; a share spares the further seeds of configurations that one seed already shows to be bad.
    from_: Annotated[int | str | None, Field(alias="from"), PlainValidator(_amount)] = None
    decide: Literal["mean"] = "mean"


class ConfirmSpec(Section):
    """The finalists and the baseline once more, from scratch, with seeds that selected nothing."""

    top: Count = 2  # the winner and its rival: most of the doubt for the least training
    seeds: Seeds
    # The length is known now, so the decay can end there: how the final model would be trained.
    schedule: Literal["constant", "linear", "cosine"] = "linear"


class TrackingSpec(Section):
    """Where MLflow keeps the runs, and under which experiment."""

    mlflow: Annotated[str, PlainValidator(_tracking_uri)] = "sqlite"  # needs no server
    # Absent = prefopt/<name>. MLflow's column has 256 characters.
    experiment: Annotated[str, Field(min_length=1, max_length=250), AfterValidator(_not_blank)] | None = None
