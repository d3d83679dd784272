"""What every engine in this process does: slots, optimizer steps, scoring and sampling on one transformers model.

How pairs lie in a batch, and what is replaced inside the model while it computes them, is the subclass's.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt_ray.engine.base import (
    REFERENCE,
    WHOLE,
    ReferencedPairs,
    Samples,
    Share,
    StepOutcome,
    SteppedTrial,
    pair_stats,
)
from prefopt_ray.engine.batches import Batch, example_pair, left_padded, ragged, runs_within, scoring_order
from prefopt_ray.engine.head import (
    Head,
    chunk_bytes,
    completion_logps,
    divergence_sums,
    reference_divergences,
    row_sums,
    token_square_sums,
)
from prefopt_ray.engine.loading import decoder_and_head
from prefopt_ray.engine.memory import Kept, budget, kept_bytes, tokens_in_memory, training_bytes
from prefopt_ray.engine.slots import Slot, Slots
from prefopt_ray.errors import ModelError, Problem
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.pairs.tokens import PairTokens, Ragged
from prefopt_ray.trial import ExecutionPlan, TrialConfig

# Tokens of prompts and completions drawn together, padding included: decoding costs per step, hardly per row. A draw
# (4 layers d=256, vocabulary 8,000, one core) took 1.6 ms of CPU per sampled token with 56 rows a step, 2.3 with the 10
# that a scoring pass would hold, reading them by policy and reference included.
DRAWN_TOKENS = 16_384
# Row of the longer pair that memory is measured on: attention that keeps its weights must show.
MEASURED_TOKENS = 1_024

log = logging.getLogger(__name__)


class LocalEngine(ABC):
    """Engine (see engine.base) over a causal LM that transformers loaded.

    `model` must be in evaluation mode (no dropout). `autocast` is the compute dtype of full
    fine-tuning with float32 weights, or None. `separate_reference` makes the reference model when it
    is not the policy at step 0; it is called once, on first use.
    """

    padded: bool  # whether a batch is as wide as its longest row

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        plan: ExecutionPlan,
        pad_id: int,
        eos_ids: tuple[int, ...],
        autocast: torch.dtype | None = None,
        separate_reference: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        self.plan = plan
        self.device = model.device
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self._model = model
        self._slots = Slots(model, separate_reference)
        self._pad_id, self._eos_ids = pad_id, eos_ids
        self._autocast = autocast
        self._decoder, self._head = decoder_and_head(model)
        self._reference_head: Head | None = None
        self._begun_with: dict[int, int] = {}  # slot -> tokens of a micro-batch, of trials that go on
        self._most_kept: int | None = None  # tokens whose activations fit the device; None: not limited

    # -- how tokens lie: the subclass's ------------------------------------------------------------

    @abstractmethod
    def _lengths(self, pairs: PairTokens) -> np.ndarray:
        """(N,) tokens that each pair takes in a batch, padding aside."""

    @abstractmethod
    def _pair_batch(self, pairs: PairTokens) -> Batch: ...

    @abstractmethod
    def _sequence_batch(self, prompts: list[np.ndarray], completions: list[np.ndarray]) -> Batch: ...

    @abstractmethod
    def _computing(self, model: PreTrainedModel) -> AbstractContextManager:
        """What must hold from a batch's forward pass to the end of its backward pass."""

    def _logps(self, model: PreTrainedModel, hidden: Tensor, batch: Batch) -> Tensor:
        """(N,) float32 log-probs at the batch's positions."""
        return completion_logps(hidden, batch, head=self._head_of(model), vocabulary=self.vocabulary)

    def _prepare_adapters(self) -> None:
        """Called when a slot was opened, before its memory is measured."""

    # -- slots -------------------------------------------------------------------------------------

    def open(self, slot: int, config: TrialConfig) -> None:
        self._begun_with.pop(slot, None)
        self._slots.open(slot, config)
        self._prepare_adapters()
        if self._most_kept is None and self.device.type == "cuda":
            self._measure_memory(slot, config)

    def _measure_memory(self, slot: int, config: TrialConfig) -> None:
        kept = self.kept(slot, recompute=config.training.gradient_checkpointing)
        coming = (
            kept.constant + training_bytes(self._slots[slot].parameters.values()) + self._logits_bytes()
            + self._slots.coming_reference_bytes
        )
        self._most_kept = tokens_in_memory(self.device, bytes_per_token=kept.per_token, coming=coming)
        self.plan = replace(self.plan, micro_batch_tokens=budget(self._most_kept))

    def plan_of(self, slot: int) -> ExecutionPlan:
        return replace(self.plan, micro_batch_tokens=self._begun_with.get(slot, self.plan.micro_batch_tokens))

    def keep_plan(self, slot: int, begun: Mapping[str, Any]) -> None:
        tokens = int(begun["micro_batch_tokens"])
        if self._most_kept is None or tokens <= self._most_kept:
            self._begun_with[slot] = tokens

    def _logits_bytes(self) -> int:
        """What the head holds for a moment, whatever the batch."""
        return chunk_bytes(self.device)

    def kept(self, slot: int, *, recompute: bool = False) -> Kept:
        """What a training step's forward pass keeps; recomputing, with one layer's own at a time."""
        whole = self._measured(slot, recompute=False)
        if not recompute:
            return whole
        inputs = self._measured(slot, recompute=True)
        layer = max(0.0, whole.per_token - inputs.per_token) / len(_recomputable_layers(self._model))
        return replace(inputs, per_token=inputs.per_token + layer)

    def _measured(self, slot: int, *, recompute: bool) -> Kept:
        short, long = self._measured_pairs()
        few = self._kept_of(slot, short, recompute=recompute)
        try:
            return Kept.of(few, self._kept_of(slot, long, recompute=recompute))
        except torch.OutOfMemoryError:
            log.info("no room for a pair of %d tokens: memory is measured on a short one", self._lengths(long)[0])
        return Kept.of((0, 0), few)

    def _measured_pairs(self) -> tuple[PairTokens, PairTokens]:
        """A short and a long one that the model has positions for."""
        longest = min(MEASURED_TOKENS, getattr(self._model.config, "max_position_embeddings", None) or MEASURED_TOKENS)
        return tuple(
            example_pair(prompt=4 * row // 5, chosen=row // 5, rejected=row // 5, vocabulary=self.vocabulary)
            for row in (longest // 4, longest)
        )

    def _kept_of(self, slot: int, pair: PairTokens, *, recompute: bool) -> tuple[int, int]:
        """(tokens, bytes): of the decoder as it is measured; of the head two hidden states for every token."""
        def forward() -> Tensor:
            with _recomputed_layers(self._model) if recompute else nullcontext(), self._precision():
                return self._hidden(self._model, self._pair_batch(pair))

        with self._slots.policy(slot) as model, self._computing(model):
            tokens = int(self._lengths(pair)[0])
            states = 2 * tokens * model.get_output_embeddings().weight.shape[-1] * model.dtype.itemsize
            return tokens, kept_bytes(forward, model.parameters()) + states

    def state(self, slot: int) -> dict[str, Tensor]:
        return self._slots.state(slot)

    def load(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Weights and optimizer from `state`; without optimizer tensors the optimizer starts fresh."""
        self._slots.load(slot, tensors)

    def export(self, slot: int, folder: Path) -> None:
        self._slots.export(slot, folder)

    # -- steps -------------------------------------------------------------------------------------

    def step(self, trials: Sequence[SteppedTrial]) -> None:
        for trial in trials:
            with self._slots.policy(trial.slot) as model, self._computing(model):
                self._step_one(trial, self._slots[trial.slot])

    def _step_one(self, trial: SteppedTrial, slot: Slot) -> None:
        limit = trial.config.training.max_grad_norm
        try:
            stats, losses = self._accumulate(trial, trial.next_batch())
            norm = torch.nn.utils.clip_grad_norm_(slot.parameters.values(), limit if limit > 0 else float("inf"))
            grad_norm = float(norm)
            applied = bool(np.isfinite(grad_norm)) and bool(torch.isfinite(losses).all())
            ratio = None
            if applied:
                ratio = slot.apply(trial.learning_rate, measure=trial.measures_update)
        finally:
            slot.optimizer.zero_grad(set_to_none=True)  # out of memory must not leave half a gradient behind
        trial.finish_step(StepOutcome(
            stats=stats.cpu(), losses=losses.cpu(), grad_norm=grad_norm,
            clipped=bool(limit > 0 and grad_norm > limit), update_ratio=ratio, applied=applied,
        ))

    def _accumulate(self, trial: SteppedTrial, pairs: ReferencedPairs) -> tuple[PairStats, Tensor]:
        """Gradient of the mean loss over all pairs, micro-batch by micro-batch; their statistics and losses (B,)."""
        parts = [pairs.take(rows) for rows in self._micro_batches(trial, pairs.tokens)]
        if trial.card.scope == "batch" and len(parts) > 1:
            return self._accumulate_whole(trial, parts)
        gathered: list[PairStats] = []
        losses: list[Tensor] = []
        for part in parts:
            stats = self._statistics(trial, part)
            loss = trial.loss(stats)  # (b,)
            (loss.sum() / len(pairs)).backward()
            gathered.append(stats.detach())
            losses.append(loss.detach())
        return PairStats.gather(gathered), torch.cat(losses)

    def _micro_batches(self, trial: SteppedTrial, pairs: PairTokens) -> list[np.ndarray]:
        """Consecutive pairs: as many as the trial says, or else as fit the plan's token budget."""
        size, indices = trial.config.training.micro_batch_pairs, np.arange(len(pairs))
        if size is not None:
            return [indices[start : start + size] for start in range(0, len(pairs), size)]
        most = self.plan_of(trial.slot).micro_batch_tokens
        spans = runs_within(self._lengths(pairs), token_budget=most, padded=self.padded)
        return [indices[span] for span in spans]

    def pair_tokens(self, pairs: PairTokens) -> np.ndarray:
        """(N,) tokens that each pair takes in a batch, padding aside."""
        return self._lengths(pairs)

    def forward_tokens(self, trial: SteppedTrial, pairs: PairTokens) -> list[int]:
        """Tokens of each forward pass that a step of the trial on `pairs` makes, padding included."""
        lengths = self._lengths(pairs)
        return [
            int(lengths[rows].max() * len(rows) if self.padded else lengths[rows].sum())
            for rows in self._micro_batches(trial, pairs)
        ]

    def _accumulate_whole(self, trial: SteppedTrial, parts: list[ReferencedPairs]) -> tuple[PairStats, Tensor]:
        """The same for a loss that looks at the whole batch, in two passes: first every pair's statistics and the
        loss's slope in each, then the micro-batches again, each pulled by its slopes."""
        with torch.no_grad():
            whole = PairStats.gather([self._statistics(trial, part) for part in parts])
        leaves = whole.map(lambda values: values.clone().requires_grad_() if values.is_floating_point() else values)
        losses = trial.loss(leaves)  # (B,)
        losses.mean().backward()
        slopes = {name: leaf.grad for name, leaf in leaves.present().items() if leaf.grad is not None}
        start = 0
        for part in parts:
            stats = self._statistics(trial, part)
            pull = [
                (slopes[name][start : start + len(part)] * values).sum()
                for name, values in stats.present().items() if name in slopes and values.requires_grad
            ]
            sum(pull).backward()
            start += len(part)
        return whole, losses.detach()

    def _statistics(self, trial: SteppedTrial, pairs: ReferencedPairs) -> PairStats:
        """What the trial's card needs, differentiable where a gradient flows through it."""
        with _recomputed_layers(self._model) if self._recomputes(trial, pairs.tokens) else nullcontext():
            batch = self._pair_batch(pairs.tokens)
            # The reference first: switching adapters must not happen between a forward and its backward.
            with torch.no_grad():
                extras = self._extras_without_gradient(trial, pairs)
                reference = self._reference_reading(batch) if "distribution" in trial.card.needs else None
            with self._precision():
                hidden = self._hidden(self._model, batch)
                extras |= self._extras_of_policy(trial.card.needs, hidden, reference, batch=batch)
                logps = self._logps(self._model, hidden, batch)
        if "per_token" in trial.card.needs:
            shorter = np.minimum(pairs.tokens.chosen.lengths, pairs.tokens.rejected.lengths)
            limit = torch.as_tensor(np.concatenate([shorter, shorter]), device=self.device)[batch.rows]  # (N,)
            prefix = _by_side(row_sums(logps.where(batch.places < limit, 0.0), batch))
            extras |= {"policy_chosen_prefix": prefix[:, 0], "policy_rejected_prefix": prefix[:, 1]}
        return pair_stats(pairs, _by_side(row_sums(logps, batch)), **extras)

    def _recomputes(self, trial: SteppedTrial, pairs: PairTokens) -> bool:
        """Whether layers are computed again in the backward pass: as asked, or because a single pair is too long."""
        lengths = self._lengths(pairs)
        tokens = int(lengths.max() * len(pairs) if self.padded else lengths.sum())
        too_long = self._most_kept is not None and tokens > self._most_kept
        return too_long or trial.config.training.gradient_checkpointing

    def _extras_without_gradient(self, trial: SteppedTrial, pairs: ReferencedPairs) -> dict[str, Tensor]:
        if "mismatched" not in trial.card.needs:
            return {}
        other = pairs.derived["mismatched"]
        drift = self._pair_logps(self._model, other.tokens) - torch.as_tensor(other.reference, device=self.device)
        return {"mismatched_drift": drift.mean(1)}

    def _extras_of_policy(
        self, needs: frozenset[str], hidden: Tensor, reference: tuple[Tensor, Head] | None, *, batch: Batch
    ) -> dict[str, Tensor]:
        extras: dict[str, Tensor] = {}
        if "token_sq" in needs:
            squares = token_square_sums(hidden, batch, head=self._head, vocabulary=self.vocabulary)
            chosen, rejected = _by_side(row_sums(squares, batch)).unbind(1)
            extras |= {"chosen_token_sq": chosen, "rejected_token_sq": rejected}
        if reference is not None:
            reference_hidden, reference_head = reference
            divergences = reference_divergences(
                hidden, reference_hidden, batch, heads=(self._head, reference_head), vocabulary=self.vocabulary
            )
            chosen, rejected = _by_side(row_sums(divergences, batch)).unbind(1)
            extras |= {"chosen_kl": chosen, "rejected_kl": rejected}
        return extras

    def _reference_reading(self, batch: Batch) -> tuple[Tensor, Head]:
        """The reference's hidden states, and what makes logits of them."""
        with self._slots.policy(REFERENCE) as model, self._computing(model), self._precision():
            return self._hidden(model, batch), self._logits_of(REFERENCE)

    # -- scoring -----------------------------------------------------------------------------------

    def score(
        self, slot: int, pairs: PairTokens, *, advance: Callable[[int], None] | None = None, share: Share = WHOLE
    ) -> np.ndarray:
        out = np.zeros((len(pairs), 2), dtype=np.float32)
        groups = scoring_order(self._lengths(pairs), token_budget=self.plan.scoring_tokens, padded=self.padded)
        with torch.inference_mode(), self._slots.policy(slot) as model, self._computing(model):
            for rows in groups[share.number :: share.of]:
                out[rows] = self._pair_logps(model, pairs.take(rows)).cpu().numpy()
                if advance is not None:
                    advance(len(rows))
        return out

    def _pair_logps(self, model: PreTrainedModel, pairs: PairTokens) -> Tensor:
        """(B, 2) float32 summed completion log-probs."""
        batch = self._pair_batch(pairs)
        with self._precision():
            logps = self._logps(model, self._hidden(model, batch), batch)
        return _by_side(row_sums(logps, batch))

    def _hidden(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        decoder = self._decoder if model is self._model else model.get_decoder()
        return decoder(input_ids=batch.input_ids, use_cache=False, **batch.model_inputs).last_hidden_state  # (R, T, d)

    def _head_of(self, model: PreTrainedModel) -> Head:
        if model is self._model:
            return self._head
        if self._reference_head is None:
            self._reference_head = decoder_and_head(model)[1]
        return self._reference_head

    def _logits_of(self, slot: int) -> Head:
        """(n, d) -> (n, V) of a slot. Only to an adapter on the head itself must be switched, for every chunk."""
        with self._slots.policy(slot) as model:
            if type(model.get_output_embeddings()) is nn.Linear:
                return self._head_of(model)
        return partial(self._switched_logits, slot)

    def _switched_logits(self, slot: int, states: Tensor) -> Tensor:
        with self._slots.policy(slot) as model:
            return self._head_of(model)(states)

    def _precision(self) -> torch.autocast | nullcontext:
        return torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()

    # -- sampling ----------------------------------------------------------------------------------

    def sample(self, slot: int, prompts: Ragged, *, max_new_tokens: int, seed: int) -> Samples:
        sequences = [prompts[i] for i in range(len(prompts))]
        longest = max(len(p) for p in sequences) + max_new_tokens
        rows = max(1, max(DRAWN_TOKENS, self.plan.scoring_tokens) // longest)
        parts = [
            self._sample_part(slot, sequences[start : start + rows], max_new_tokens=max_new_tokens, seed=seed + start)
            for start in range(0, len(sequences), rows)
        ]
        tokens = [part.completions[i] for part in parts for i in range(len(part.completions))]
        columns = ("finished", "kl", "entropy", "positions")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}
        return Samples(completions=ragged(tokens), **joined)

    def _sample_part(self, slot: int, prompts: list[np.ndarray], *, max_new_tokens: int, seed: int) -> Samples:
        drawn = self._generate(slot, prompts, max_new_tokens=max_new_tokens, seed=seed)
        ends = [np.flatnonzero(np.isin(row, self._eos_ids)) for row in drawn]
        finished = np.array([len(end) > 0 for end in ends])
        # With the end token: whether to stop is a choice of the policy like any other.
        whole = [row[: end[0] + 1] if len(end) else row for row, end in zip(drawn, ends, strict=True)]
        lengths = np.array([len(prompt) + len(row) for prompt, row in zip(prompts, whole, strict=True)])
        spans = runs_within(lengths, token_budget=self.plan.scoring_tokens, padded=self.padded)
        read = [self._divergences(slot, prompts[span], whole[span]) for span in spans]
        kl, entropy = (torch.cat(column) for column in zip(*read, strict=True))
        bare = [row[:-1] if done else row for row, done in zip(whole, finished, strict=True)]
        return Samples(
            completions=ragged(bare), finished=finished,
            kl=kl.cpu().numpy().astype(np.float64), entropy=entropy.cpu().numpy().astype(np.float64),
            positions=np.array([len(row) for row in whole]),
        )

    def _divergences(
        self, slot: int, prompts: list[np.ndarray], completions: list[np.ndarray]
    ) -> tuple[Tensor, Tensor]:
        """(R,) KL(pi || ref) and (R,) entropy of pi, summed over each completion's positions."""
        batch = self._sequence_batch(prompts, completions)
        with torch.inference_mode(), self._precision():
            with self._slots.policy(slot) as model, self._computing(model):
                policy = self._hidden(model, batch)
            with self._slots.policy(REFERENCE) as model, self._computing(model):
                reference = self._hidden(model, batch)
            heads = (self._logits_of(slot), self._logits_of(REFERENCE))
            return divergence_sums(policy, reference, batch, heads=heads, vocabulary=self.vocabulary)

    def _generate(self, slot: int, prompts: list[np.ndarray], *, max_new_tokens: int, seed: int) -> np.ndarray:
        """(R, up to max_new_tokens) sampled ids; after the end token a row holds padding."""
        ids, mask = left_padded(prompts, pad_id=self._pad_id, device=self.device)
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
            eos_token_id=list(self._eos_ids) or None, pad_token_id=self._pad_id, use_cache=True,
        )
        cuda = [self.device] if self.device.type == "cuda" else []
        with (
            torch.inference_mode(), torch.random.fork_rng(devices=cuda), self._precision(),
            self._slots.policy(slot) as model, _own_generation_config_hidden(model),
        ):
            torch.manual_seed(seed)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return out[:, ids.shape[1] :].cpu().numpy()


@contextmanager
def _recomputed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within, the decoder's layers keep their input only and are computed again in the backward pass.

    Not transformers' own switch: it acts on layers in training mode only, which turns on the dropout some
    of them do themselves (OPT), and it takes the cache away from a model that is sampling.
    """
    layers = _recomputable_layers(model)
    if not layers:
        raise ModelError(Problem(
            place=str(model.config._name_or_path), key="training.gradient_checkpointing", found=type(model).__name__,
            rule="its layers cannot be recomputed", fix="leave gradient checkpointing off for this model",
        ))
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own forward shows again


def _recomputable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _own_generation_config_hidden(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what is unset from the model's own settings, which may sharpen or penalise."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _by_side(sums: Tensor) -> Tensor:
    """(2B,) chosen rows first -> (B, 2)."""
    return sums.view(2, -1).T
