"""The plain engine: transformers' own forward on padded batches, peft adapters as slots, torch optimizers.

One forward and backward per trial, each trial's slot switched in. The reference is the same model
with adapters off where it can be (LoRA, reference `start`), otherwise a second model.
Full fine-tuning has one slot and a pristine copy of the weights in host memory.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt_ray.engine.base import (
    REFERENCE,
    ReferencedPairs,
    Samples,
    StepOutcome,
    SteppedTrial,
    pair_stats,
)
from prefopt_ray.engine.batches import SequenceBatch, left_padded, pair_batch, ragged, scoring_order, sequence_batch
from prefopt_ray.engine.head import (
    completion_logps,
    divergence_sums,
    reference_divergences,
    row_sums,
    token_square_sums,
)
from prefopt_ray.engine.loading import decoder_and_head
from prefopt_ray.errors import ModelError, Problem
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.pairs.tokens import PairTokens, Ragged
from prefopt_ray.trial import AdapterConfig, ExecutionPlan, OptimizerConfig, TrialConfig

SCORING_TOKENS = 16384  # padded tokens in one forward without gradients


@dataclass
class Slot:
    """One trial's place: the adapter's name, its trainable parameters by plain name, its optimizer."""

    adapter: str | None  # None: full fine-tuning
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    optimizer_config: OptimizerConfig


class PlainEngine:
    """Engine (see engine.base) over any causal LM that transformers loads.

    `model` must be in evaluation mode (no dropout). `autocast` is the compute dtype of full
    fine-tuning with float32 weights, or None. `separate_reference` makes the reference model when it
    is not the policy at step 0; it is called once, on first use.
    """

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
        self._model = model
        self._pad_id, self._eos_ids = pad_id, eos_ids
        self._autocast = autocast
        self._decoder, self._head = decoder_and_head(model)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self._slots: dict[int, Slot] = {}
        self._peft: PeftModel | None = None
        self._pristine: dict[str, Tensor] | None = None
        self._make_reference = separate_reference
        self._reference: PreTrainedModel | None = None
        self._reference_head: Callable[[Tensor], Tensor] | None = None

    # -- slots -------------------------------------------------------------------------------------

    def open(self, slot: int, config: TrialConfig) -> None:
        if (self._peft if config.adapter.kind == "none" else self._pristine) is not None:
            # The base under an adapter must be pristine; after full fine-tuning it is not.
            raise ValueError("one engine serves either adapters or full fine-tuning, not both")
        if config.adapter.kind == "none":
            parameters = self._open_full(slot)
            adapter = None
        else:
            adapter = f"slot{slot}"
            parameters = self._open_adapter(adapter, config.adapter, seed=config.seed)
        optimizer = _make_optimizer(parameters, config.training.optimizer)
        self._slots[slot] = Slot(adapter, parameters, optimizer, config.training.optimizer)

    def _open_adapter(self, name: str, adapter: AdapterConfig, *, seed: int) -> dict[str, nn.Parameter]:
        target = adapter.target if isinstance(adapter.target, str) else list(adapter.target)
        lora = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, target_modules=target, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # peft draws A from the global CPU generator
            if self._peft is None:
                self._peft = get_peft_model(self._model, lora, adapter_name=name)
            else:
                if name in self._peft.peft_config:
                    self._peft.delete_adapter(name)
                self._peft.add_adapter(name, lora)
        self._peft.set_adapter(name)
        return {
            full.replace(f".{name}.", "."): parameter
            for full, parameter in self._model.named_parameters()
            if f".{name}." in full
        }

    def _open_full(self, slot: int) -> dict[str, nn.Parameter]:
        if slot != 0:
            raise ValueError("full fine-tuning has one slot")
        parameters = dict(self._model.named_parameters())
        if self._pristine is None:
            self._pristine = {name: p.detach().cpu().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.requires_grad_(requires_grad=True)
                parameter.grad = None
                parameter.copy_(self._pristine[name])
        return parameters

    @contextmanager
    def _policy(self, slot: int) -> Iterator[PreTrainedModel]:
        """The model computing a slot's policy, or the reference."""
        if slot != REFERENCE:
            adapter = self._slots[slot].adapter
            if adapter is not None and self._peft is not None and self._peft.active_adapter != adapter:
                self._peft.set_adapter(adapter)
            yield self._model
        elif self._make_reference is not None or self._pristine is not None:
            yield self._reference_model()
        elif self._peft is not None:
            with self._peft.disable_adapter():
                yield self._model
        else:
            yield self._model  # nothing was opened yet: the base itself

    def _reference_model(self) -> PreTrainedModel:
        if self._reference is None:
            if self._make_reference is not None:
                self._reference = self._make_reference()
            else:
                self._reference = copy.deepcopy(self._model)
                with torch.no_grad():
                    for name, parameter in self._reference.named_parameters():
                        parameter.requires_grad_(requires_grad=False)
                        parameter.copy_(self._pristine[name])
        return self._reference

    # -- computing ---------------------------------------------------------------------------------

    def step(self, trials: Sequence[SteppedTrial]) -> None:
        for trial in trials:
            with self._policy(trial.slot):
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
                ratio = self._apply(slot, trial.learning_rate, measure=trial.measures_update)
        finally:
            slot.optimizer.zero_grad(set_to_none=True)  # out of memory must not leave half a gradient behind
        trial.finish_step(StepOutcome(
            stats=stats.cpu(), losses=losses.cpu(), grad_norm=grad_norm,
            clipped=0 < limit < grad_norm, update_ratio=ratio, applied=applied,
        ))

    def _accumulate(self, trial: SteppedTrial, pairs: ReferencedPairs) -> tuple[PairStats, Tensor]:
        """Gradient of the mean loss over all pairs, micro-batch by micro-batch; their statistics and losses (B,)."""
        size = trial.config.training.micro_batch_pairs
        parts = [pairs.take(np.arange(i, min(i + size, len(pairs)))) for i in range(0, len(pairs), size)]
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
        with _recomputed_layers(self._model) if trial.config.training.gradient_checkpointing else nullcontext():
            batch = pair_batch(pairs.tokens, pad_id=self._pad_id, device=self.device)
            # The reference first: switching adapters must not happen between a forward and its backward.
            with torch.no_grad():
                extras = self._extras_without_gradient(trial, pairs)
                reference = self._reference_hidden(batch) if "distribution" in trial.card.needs else None
            with self._precision():
                hidden = self._hidden(self._model, batch)
                extras |= self._extras_of_policy(trial.card.needs, hidden, reference, batch=batch)
                logps = completion_logps(hidden, batch, head=self._head, vocabulary=self.vocabulary)
        if "per_token" in trial.card.needs:
            shorter = np.minimum(pairs.tokens.chosen.lengths, pairs.tokens.rejected.lengths)
            limit = torch.as_tensor(np.concatenate([shorter, shorter]), device=self.device)[batch.rows]  # (N,)
            prefix = _by_side(row_sums(logps.where(batch.places < limit, 0.0), batch))
            extras |= {"policy_chosen_prefix": prefix[:, 0], "policy_rejected_prefix": prefix[:, 1]}
        return pair_stats(pairs, _by_side(row_sums(logps, batch)), **extras)

    def _extras_without_gradient(self, trial: SteppedTrial, pairs: ReferencedPairs) -> dict[str, Tensor]:
        if "mismatched" not in trial.card.needs:
            return {}
        other = pairs.derived["mismatched"]
        drift = self._pair_logps(self._model, other.tokens) - torch.as_tensor(other.reference, device=self.device)
        return {"mismatched_drift": drift.mean(1)}

    def _extras_of_policy(
        self, needs: frozenset[str], hidden: Tensor, reference: Tensor | None, *, batch: SequenceBatch
    ) -> dict[str, Tensor]:
        extras: dict[str, Tensor] = {}
        if "token_sq" in needs:
            squares = token_square_sums(hidden, batch, head=self._head, vocabulary=self.vocabulary)
            chosen, rejected = _by_side(row_sums(squares, batch)).unbind(1)
            extras |= {"chosen_token_sq": chosen, "rejected_token_sq": rejected}
        if reference is not None:
            heads = (self._head, partial(self._logits, REFERENCE))
            divergences = reference_divergences(hidden, reference, batch, heads=heads, vocabulary=self.vocabulary)
            chosen, rejected = _by_side(row_sums(divergences, batch)).unbind(1)
            extras |= {"chosen_kl": chosen, "rejected_kl": rejected}
        return extras

    def _reference_hidden(self, batch: SequenceBatch) -> Tensor:
        with self._policy(REFERENCE) as model, self._precision():
            return self._hidden(model, batch)

    def _apply(self, slot: Slot, learning_rate: float, *, measure: bool) -> float | None:
        for group in slot.optimizer.param_groups:
            group["lr"] = learning_rate
        if not measure:
            slot.optimizer.step()
            return None
        parameters = [p.detach() for p in slot.parameters.values()]
        before = [p.clone() for p in parameters]
        slot.optimizer.step()
        moved = _norm(torch._foreach_sub(parameters, before))
        return float(moved / _norm(before).clamp_min(1e-30))

    def score(self, slot: int, pairs: PairTokens, *, advance: Callable[[int], None] | None = None) -> np.ndarray:
        out = np.empty((len(pairs), 2), dtype=np.float32)
        with torch.inference_mode(), self._policy(slot) as model:
            for rows in scoring_order(2 * pairs.longest, token_budget=SCORING_TOKENS):
                out[rows] = self._pair_logps(model, pairs.take(rows)).cpu().numpy()
                if advance is not None:
                    advance(len(rows))
        return out

    def _pair_logps(self, model: PreTrainedModel, pairs: PairTokens) -> Tensor:
        """(B, 2) float32 summed completion log-probs."""
        batch = pair_batch(pairs, pad_id=self._pad_id, device=self.device)
        with self._precision():
            hidden = self._hidden(model, batch)
            logps = completion_logps(hidden, batch, head=self._head_of(model), vocabulary=self.vocabulary)
        return _by_side(row_sums(logps, batch))

    def _hidden(self, model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
        decoder = self._decoder if model is self._model else model.get_decoder()
        out = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return out.last_hidden_state  # (R, T, d)

    def _head_of(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        if model is self._model:
            return self._head
        if self._reference_head is None:
            self._reference_head = decoder_and_head(model)[1]
        return self._reference_head

    def _logits(self, slot: int, states: Tensor) -> Tensor:
        """(n, V) under a slot's own head: an adapter may sit on it too."""
        with self._policy(slot) as model:
            return self._head_of(model)(states)

    def _precision(self) -> torch.autocast | nullcontext:
        return torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext()

    def sample(self, slot: int, prompts: Ragged, *, max_new_tokens: int, seed: int) -> Samples:
        sequences = [prompts[i] for i in range(len(prompts))]
        longest = max(len(p) for p in sequences) + max_new_tokens
        rows = max(1, SCORING_TOKENS // longest)
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
        batch = sequence_batch(prompts, whole, pad_id=self._pad_id, device=self.device)
        with torch.inference_mode(), self._precision():
            with self._policy(slot) as model:
                policy = self._hidden(model, batch)
            with self._policy(REFERENCE) as model:
                reference = self._hidden(model, batch)
            heads = (partial(self._logits, slot), partial(self._logits, REFERENCE))
            kl, entropy = divergence_sums(policy, reference, batch, heads=heads, vocabulary=self.vocabulary)
        bare = [row[:-1] if done else row for row, done in zip(whole, finished, strict=True)]
        return Samples(
            completions=ragged(bare), finished=finished,
            kl=kl.cpu().numpy().astype(np.float64), entropy=entropy.cpu().numpy().astype(np.float64),
            positions=np.array([len(row) for row in whole]),
        )

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
            self._policy(slot) as model, _own_generation_config_hidden(model),
        ):
            torch.manual_seed(seed)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        return out[:, ids.shape[1] :].cpu().numpy()

    # -- keeping -----------------------------------------------------------------------------------

    def state(self, slot: int) -> dict[str, Tensor]:
        owned = self._slots[slot]
        tensors = {f"weights/{name}": p.detach().cpu().clone() for name, p in owned.parameters.items()}
        for name, parameter in owned.parameters.items():
            for key, value in owned.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value.detach().cpu().clone()
        return tensors

    def load(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Weights and optimizer from `state`; without optimizer tensors the optimizer starts fresh."""
        owned = self._slots[slot]
        with torch.no_grad():
            for name, parameter in owned.parameters.items():
                parameter.copy_(tensors[f"weights/{name}"])
        owned.optimizer = _make_optimizer(owned.parameters, owned.optimizer_config)
        for tensor_name, value in tensors.items():
            kind, _, rest = tensor_name.partition("/")
            if kind == "optimizer":
                key, _, name = rest.partition("/")
                parameter = owned.parameters[name]
                # AdamW keeps its step count on the CPU, whatever the device.
                place = value.clone() if key == "step" else value.to(parameter.device, copy=True)
                owned.optimizer.state[parameter][key] = place

    def export(self, slot: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        owned = self._slots[slot]
        if owned.adapter is None:
            self._model.save_pretrained(folder)
            return
        weights = get_peft_model_state_dict(self._peft, adapter_name=owned.adapter)
        tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = copy.copy(self._peft.peft_config[owned.adapter])
        config.inference_mode = True
        config.base_model_name_or_path = self._model.config._name_or_path  # peft sets it for its first adapter only
        config.save_pretrained(folder)


def _make_optimizer(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    values = list(parameters.values())
    if config.kind == "sgd":
        return torch.optim.SGD(values, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(values, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


@contextmanager
def _recomputed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within, the decoder's layers keep their input only and are computed again in the backward pass.

    Not transformers' own switch: it acts on layers in training mode only, which turns on the dropout some
    of them do themselves (OPT), and it takes the cache away from a model that is sampling.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
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


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.float()) for t in tensors]))
