"""From a spec to what trials share: model source, token ids, reference, and a blueprint of the warm worker.

The one place where spec, pairs, engine and gold meet. Knows nothing of Ray or MLflow: a notebook and
`prefopt train` use it as sweeps do.
"""

import importlib.metadata
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.engine.batches import shared_lengths
from prefopt_ray.engine.loading import (
    ModelSource,
    check_length_fits,
    check_tokens_fit,
    load_config,
    load_model,
    load_tokenizer,
    local_adapter,
    source_digest,
)
from prefopt_ray.engine.choose import EngineChoice, choose_engine, open_engine
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.engine.memory import scoring_tokens
from prefopt_ray.engine.quantised import NF4, PACKAGE, require_base_fits, require_four_bits
from prefopt_ray.engine.reference import Progress, ReferenceKey, keep_reference, missing_passes, score_passes
from prefopt_ray.gold.bandit import bandit_rows, ensure_bandit
from prefopt_ray.gold.base import ensure_gold_base
from prefopt_ray.gold.pairs import gold_rows, with_flipped_labels
from prefopt_ray.gold.scorer import GoldScorer
from prefopt_ray.judges.prompts import read_prompts
from prefopt_ray.judges.rungs import RungJudgePlan
from prefopt_ray.losses.cards import find_card
from prefopt_ray.losses.registry import RegisteredLoss, register_loss, registered_losses
from prefopt_ray.pairs.config import MODEST_PAIRS, PairsConfig, PartConfig, SourceConfig
from prefopt_ray.pairs.load import LoadedPairs, load_sweep_data
from prefopt_ray.pairs.shapes import SCORE_KEYS
from prefopt_ray.pairs.tokens import PairTokens, SweepData
from prefopt_ray.spec import OtherModel, PartSpec, SweepSpec
from prefopt_ray.spec.evaluation_plan import Workload, share
from prefopt_ray.spec.sections import TrainingSpec
from prefopt_ray.thresholds import Thresholds
from prefopt_ray.train import Worker, make_worker
from prefopt_ray.trial import AdapterConfig, ExecutionPlan, TrialConfig

GOLD, BANDIT = "gold", "bandit"
DEFAULT_SHARE = 0.2  # a select or test part that the spec does not name takes at most this share of the train source
COSTLY_EVALUATION = 0.25  # of a trial's cost; above it a person is told
# Four evaluations of as many pairs cost a sixth of the training with a LoRA (two forward passes per pair).
SELECT_SHARE_OF_TRAINING = 0.08
Stage = Callable[[str], Progress]  # name of a long step -> its progress function


@dataclass(frozen=True)
class WorkerBlueprint:
    """All that a process needs to become a warm worker. Travels through Ray's object store; arrays are not copied."""

    model: ModelSource
    reference: ModelSource | None  # None: the policy at step 0
    weights: str  # digest of the policy's weights, merged adapters included
    reference_weights: str
    full_finetuning: bool
    pad_id: int
    eos_ids: tuple[int, ...]
    largest_id: int
    longest_pair: int  # tokens
    probe_pairs: int
    sample_prompts: int
    gold: bool
    threads: int
    device: str  # cpu | cuda
    choice: EngineChoice
    gpu_share: float = 1.0  # of the GPU's memory, where trials share one
    needs: frozenset[str] = frozenset()  # of all losses that will train
    losses: tuple[RegisteredLoss, ...] = ()  # those of them that another process cannot find by name alone
    thresholds: Thresholds = Thresholds()
    judge: RungJudgePlan | None = None  # None: no judge inside trials
    parts: dict[str, ReferencedPairs] | None = None  # None: the reference pass is still to be made

    def __call__(self) -> Worker:
        """Load the model and open the worker. Raises ModelError."""
        if self.parts is None:
            raise ValueError("the reference pass comes first: blueprint.with_reference(...)")
        for card, formula in self.losses:
            register_loss(card, formula)
        engine = self.open_engine()
        tokenizer = load_tokenizer(self.model)
        return make_worker(
            engine, self.parts,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            probe_pairs=self.probe_pairs, sample_prompts=self.sample_prompts,
            scorers=(GoldScorer(),) if self.gold else (),
            judges=(self.judge.open(device=self.device),) if self.judge else (), reference_is_start=self.reference is None,
            thresholds=self.thresholds,
        )

    def open_engine(self) -> LocalEngine:
        torch.set_num_threads(self.threads)
        device = torch.device(self.device)
        if self.device == "cuda" and self.gpu_share < 1:
            # A trial that takes more is out of memory itself, instead of its neighbours.
            torch.cuda.set_per_process_memory_fraction(self.gpu_share)
        # Full fine-tuning in bfloat16 would round small updates away: float32 weights, bfloat16 arithmetic.
        autocast = torch.bfloat16 if self.full_finetuning and self.model.dtype == "bfloat16" else None
        weights = "float32" if autocast else self.model.dtype
        model = load_model(self.model, device=device, weights_dtype=weights)
        check_tokens_fit(model, load_tokenizer(self.model), largest_id=self.largest_id)
        check_length_fits(model, longest=self.longest_pair)
        other = self.reference
        return open_engine(
            self.choice, model, plan=self.plan, pad_id=self.pad_id, eos_ids=self.eos_ids, autocast=autocast,
            separate_reference=(
                (lambda: load_model(other, device=device, weights_dtype=weights)) if other else None
            ),
        )

    @property
    def plan(self) -> ExecutionPlan:
        """How trials will be computed, as far as it is known before the model is loaded."""
        return ExecutionPlan(
            engine=self.choice.engine, device=self.device, dtype=self.model.dtype, attention="", threads=self.threads,
            reason=self.choice.reason, scoring_tokens=scoring_tokens(self.device),
            versions=_versions(quantised=self.model.quantisation is not None),
        )

    def with_reference(
        self, data: SweepData, *, cache: Path | None, progress: Progress | None = None
    ) -> "WorkerBlueprint":
        """The blueprint with reference log-probs: from the cache, or by loading the model for one pass."""
        missing = self.missing_reference(data, cache=cache)
        made = score_passes(self.open_engine(), missing, progress=progress) if missing else {}
        return self.keeping_reference(data, [made], cache=cache)

    def missing_reference(self, data: SweepData, *, cache: Path | None) -> dict[str, PairTokens]:
        """What the reference pass has to score: nothing where all of it is in the cache."""
        return missing_passes(data, self.reference_key(), cache=cache, needs=self.needs)

    def keeping_reference(
        self, data: SweepData, shares: Sequence[Mapping[str, np.ndarray]], *, cache: Path | None
    ) -> "WorkerBlueprint":
        """The blueprint with what was scored, in shares, of `missing_reference`, which also goes into the cache."""
        parts = keep_reference(data, self.reference_key(), shares, cache=cache, needs=self.needs)
        return replace(self, parts=parts)

    def reference_key(self) -> ReferenceKey:
        dtype = f"{self.model.dtype}{'/autocast' if self.full_finetuning else ''}"
        # Another number of threads adds up in another order, and step 0 would no longer equal the reference exactly.
        device = f"cpu/{self.threads}" if self.device == "cpu" else self.device
        layout = f"{self.plan.engine}/{self.plan.scoring_tokens}"
        return ReferenceKey(self.reference_weights, dtype, "default", device, layout)


@dataclass(frozen=True)
class Prepared:
    """A spec made concrete on this machine: by `prepare` up to the reference pass, by `open_worker` with it."""

    spec: SweepSpec
    blueprint: WorkerBlueprint
    tokenizer: PreTrainedTokenizerBase
    loaded: LoadedPairs

    @property
    def train_pairs(self) -> int:
        return len(self.loaded.data.train)

    @property
    def longest_tokens(self) -> int:
        return int(self.loaded.data.train.longest.max())

    def trial_config(self, loss: str, values: Mapping[str, float]) -> TrialConfig:
        """One trial of the spec on these pairs. Raises SpecError if `values` are not the loss's."""
        return self.spec.trial_config(
            loss, values, train_pairs=self.train_pairs, workload=self.workload
        )

    @property
    def workload(self) -> Workload:
        return _workload(self.spec, self.loaded.data)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before the trials begin."""
        plan = self.spec.evaluation(self.spec.total_steps(self.train_pairs), self.workload)
        part = share(self.workload, plan)
        if part <= COSTLY_EVALUATION:
            return self.loaded.warnings
        costs = (
            f"evaluating will take about {part:.0%} of each trial: {len(self.loaded.data.select)} select pairs and "
            f"{plan.probe_pairs} train pairs at {len(plan.steps) - 1} steps of {plan.steps[-1]}; "
            "train longer, or lower data.select.pairs, eval.train_probe or eval.at"
        )
        return (*self.loaded.warnings, costs)


def cache_folder(spec: SweepSpec) -> Path:
    return spec.storage / "cache"


def prepare(spec: SweepSpec, *, stage: Stage, device: str, threads: int) -> Prepared:
    """Model source, tokenizer, token ids. Raises ModelError and DataError."""
    if spec.model.adapter.kind == "qlora":
        require_four_bits()
    source = policy_source(spec, stage=stage)
    tokenizer, config = load_tokenizer(source), load_config(source)
    require_base_fits(config, adapter_kind=spec.model.adapter.kind, merges=bool(source.adapters))
    pairs = pairs_config(spec, source)
    loaded = load_sweep_data(pairs, tokenizer, cache=cache_folder(spec) / "pairs", progress=stage("tokenising"))
    reference = _reference_source(spec, source)
    weights = source_digest(source)
    evaluation = spec.evaluation(
        spec.total_steps(len(loaded.data.train)), _workload(spec, loaded.data)
    )
    blueprint = WorkerBlueprint(
        model=source,
        reference=reference,
        weights=weights,
        reference_weights=source_digest(reference) if reference else weights,
        full_finetuning=spec.model.adapter.kind == "none",
        pad_id=loaded.data.pad_id,
        eos_ids=loaded.data.eos_ids,
        largest_id=loaded.max_token_id,
        longest_pair=max(int(part.longest.max()) for part in loaded.data.parts.values()),
        probe_pairs=evaluation.probe_pairs,
        sample_prompts=evaluation.sample_prompts,
        gold=spec.data.is_gold,
        threads=threads,
        device=device,
        gpu_share=spec.resources.gpu_share(gpus_present=True) or 1.0,
        choice=choose_engine(spec.engine, config, AdapterConfig(**dict(spec.model.adapter))),
        needs=frozenset().union(*(find_card(loss).needs for loss in _trained_losses(spec))),
        losses=_registered_among(_trained_losses(spec)),
        thresholds=spec.thresholds,
        judge=_rung_judge(spec, pairs, loaded.data.select, prompts=evaluation.sample_prompts),
    )
    return Prepared(_at_commit(spec, source), blueprint, tokenizer, loaded)


def prepare_here(spec: SweepSpec, *, stage: Stage) -> Prepared:
    """`prepare` for this process and the device that it has."""
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu and spec.resources.gpu_share(gpus_present=has_gpu) > 0 else "cpu"
    threads = spec.resources.cpus_per_trial if device == "cpu" else (os.cpu_count() or 1)
    return prepare(spec, stage=stage, device=device, threads=threads)


def open_worker(spec: SweepSpec, *, stage: Stage | None = None) -> tuple[Worker, Prepared]:
    """Everything in this process: what a notebook and `prefopt train` use.

    The blueprint of what comes back makes the same worker in another process, for `PreferenceTrainable`.
    """
    stage = stage or _silent
    prepared = prepare_here(spec, stage=stage)
    blueprint = prepared.blueprint.with_reference(
        prepared.loaded.data, cache=cache_folder(spec) / "reference", progress=stage("reference pass")
    )
    return blueprint(), replace(prepared, blueprint=blueprint)


def policy_source(spec: SweepSpec, *, stage: Stage) -> ModelSource:
    """Where the policy's weights are; hub ids pinned to the commit they have now."""
    model = spec.model
    quantisation = NF4 if model.adapter.kind == "qlora" else None
    if model.policy == GOLD:
        folder = ensure_gold_base(cache_folder(spec), progress=stage("gold base model"))
        return ModelSource(str(folder), dtype=model.dtype, quantisation=quantisation)
    if model.policy == BANDIT:
        return ModelSource(str(ensure_bandit(cache_folder(spec))), dtype=model.dtype)
    adapters = (model.start_adapter,) if model.start_adapter else ()
    return _pinned(ModelSource(model.policy, model.revision, adapters, model.dtype, quantisation))


def pairs_config(spec: SweepSpec, source: ModelSource) -> PairsConfig:
    """The spec's data section in the pairs layer's terms; rows of the embedded tasks are made here."""
    data = spec.data

    def part(name: str) -> PartConfig:
        written = data.part(name)
        if written.from_ == "train":
            if getattr(data, name) is not None:
                return PartConfig(None, written.pairs)
            default = PartConfig(None, written.pairs, most=DEFAULT_SHARE)
            return _affordable(default, spec.training) if name == "select" else default
        if written.source == BANDIT:  # every part has the comparisons that train names
            rows = bandit_rows(data.train.split, part=name, pairs=written.pairs)
            return PartConfig(SourceConfig(source=BANDIT, split=name, rows=tuple(rows)))
        return PartConfig(_source(written, name, source), written.pairs)

    return PairsConfig(
        train=part("train"), select=part("select"), test=part("test"),
        text=data.text_mode, max_tokens=data.max_tokens,
    )


def _affordable(select: PartConfig, training: TrainingSpec) -> PartConfig:
    """A select part that nobody sized, as large as a trial can afford to score at every evaluation."""
    if training.epochs is not None:
        return replace(select, modest=min(1.0, SELECT_SHARE_OF_TRAINING * training.epochs))
    seen = training.pairs if training.pairs is not None else training.steps * training.batch_pairs
    return replace(select, pairs=min(select.pairs, max(MODEST_PAIRS, int(SELECT_SHARE_OF_TRAINING * seen))))


def _source(part: PartSpec, name: str, model: ModelSource) -> SourceConfig:
    if part.source == GOLD:
        rows = gold_rows(Path(model.model), split=name, pairs=part.pairs)
        if part.flipped is not None:
            rows = with_flipped_labels(rows, part.flipped)
        scores = {key: key for key in SCORE_KEYS}
        return SourceConfig(source=GOLD, split=name, columns=scores, rows=tuple(rows))
    return SourceConfig(
        source=part.source, split=part.split or "train", data_dir=_tuple(part.data_dir), files=_tuple(part.files),
        revision=part.revision, columns=dict(part.columns or {}),
    )


def _tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _reference_source(spec: SweepSpec, policy: ModelSource) -> ModelSource | None:
    """None when the reference is the policy at step 0, which is the base with its adapter off."""
    reference = spec.model.reference
    if isinstance(reference, OtherModel):
        adapters = (reference.adapter,) if reference.adapter else ()
        return _pinned(ModelSource(reference.model, None, adapters, policy.dtype, policy.quantisation))
    if reference == "base" and policy.adapters:
        return replace(policy, adapters=())
    return None


def _pinned(source: ModelSource) -> ModelSource:
    """Hub ids at the commit they have now; adapters from the hub as the local folder they are downloaded to."""
    source = replace(source, adapters=tuple(local_adapter(adapter) for adapter in source.adapters))
    if Path(source.model).expanduser().is_dir():
        return source
    load_tokenizer(source)  # names what is wrong with the id before anything else does
    commit = getattr(AutoConfig.from_pretrained(source.model, revision=source.revision), "_commit_hash", None)
    return replace(source, revision=commit or source.revision)


def _at_commit(spec: SweepSpec, source: ModelSource) -> SweepSpec:
    """The spec naming the hub commit that was read: stored, printed and resumed with it."""
    if source.revision == spec.model.revision:
        return spec
    written = spec.to_dict()
    return SweepSpec.from_dict({**written, "model": {**written["model"], "revision": source.revision}})


def _trained_losses(spec: SweepSpec) -> tuple[str, ...]:
    return (spec.baseline_values()[0], *spec.loss_spaces())


def _registered_among(losses: Iterable[str]) -> tuple[RegisteredLoss, ...]:
    """Those that a person registered, also as parts of a mixture."""
    names = {name for loss in losses for name in re.split("[+:]", loss)}
    return tuple((card, formula) for card, formula in registered_losses() if card.name in names)


def _workload(spec: SweepSpec, data: SweepData) -> Workload:
    """What one trial of the spec computes on this data; the same for all of them."""
    return Workload(
        pairs_seen=spec.training.batch_pairs * spec.stop_step(spec.total_steps(len(data.train))),
        pair_tokens=_mean_tokens(data.train),
        select_pairs=len(data.select),
        select_pair_tokens=_mean_tokens(data.select),
        prompt_tokens=float(data.select.prompt.lengths.mean()),
        full_finetuning=spec.model.adapter.kind == "none",
    )


def _mean_tokens(pairs: PairTokens) -> float:
    """Of a pair as it is computed: its prompt once."""
    return float(shared_lengths(pairs).mean())


def _rung_judge(spec: SweepSpec, pairs: PairsConfig, select: PairTokens, *, prompts: int) -> RungJudgePlan | None:
    """With the texts of the prompts that trials sample, where the spec has a judge at rungs."""
    if spec.judge is None or spec.judge.at != "rungs":
        return None
    rows = select.row_ids[select.first_of_groups(prompts)]
    return RungJudgePlan(spec.judge, read_prompts(pairs, "select", rows), spec.storage)


def _versions(*, quantised: bool) -> dict[str, str]:
    import peft
    import transformers

    used = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return used | ({PACKAGE: importlib.metadata.version(PACKAGE)} if quantised else {})


def _silent(name: str) -> Progress:
    return lambda done, total: None
