"""Slots: each trial's trainable weights and optimizer on one base model, and which of them computes now.

An adapter per slot (peft), or full fine-tuning in one slot with a pristine copy in host memory. The reference is
the same model with adapters off where it can be (LoRA, reference `start`), otherwise a second model. Tensors are
kept by plain parameter name, so any engine resumes any checkpoint of its model.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.trial import AdapterConfig, OptimizerConfig, TrialConfig


@dataclass
class Slot:
    """One trial's place: the adapter's name, its trainable parameters by plain name, its optimizer."""

    adapter: str | None  # None: full fine-tuning
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    optimizer_config: OptimizerConfig

    def apply(self, learning_rate: float, *, measure: bool) -> float | None:
        """An optimizer step from the gradients that lie in the parameters; ||dW|| / ||W|| where it is measured."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if not measure:
            self.optimizer.step()
            return None
        parameters = [p.detach() for p in self.parameters.values()]
        before = [p.clone() for p in parameters]
        self.optimizer.step()
        moved = _norm(torch._foreach_sub(parameters, before))
        return float(moved / _norm(before).clamp_min(1e-30))


class Slots:
    """The slots of one model. `separate_reference` makes the reference model when it is not the policy at step 0;
    it is called once, on first use."""

    def __init__(
        self, model: PreTrainedModel, separate_reference: Callable[[], PreTrainedModel] | None = None
    ) -> None:
        self.model = model
        self.peft: PeftModel | None = None
        self._slots: dict[int, Slot] = {}
        self._pristine: dict[str, Tensor] | None = None
        self._make_reference = separate_reference
        self._reference: PreTrainedModel | None = None

    def __getitem__(self, slot: int) -> Slot:
        return self._slots[slot]

    def open(self, slot: int, config: TrialConfig) -> None:
        """A fresh adapter, or the pristine weights; and a fresh optimizer."""
        if (self.peft if config.adapter.kind == "none" else self._pristine) is not None:
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

    @contextmanager
    def policy(self, slot: int) -> Iterator[PreTrainedModel]:
        """The model computing a slot's policy, or the reference."""
        if slot != REFERENCE:
            adapter = self._slots[slot].adapter
            if adapter is not None and self.peft is not None and self.peft.active_adapter != adapter:
                self.peft.set_adapter(adapter)
            yield self.model
        elif self._make_reference is not None or self._pristine is not None:
            yield self._reference_model()
        elif self.peft is not None:
            with self.peft.disable_adapter():
                yield self.model
        else:
            yield self.model  # nothing was opened yet: the base itself

    @property
    def coming_reference_bytes(self) -> int:
        """Of a reference model that is still to be made beside this one; about, since it may be another model."""
        if self._reference is not None or (self._make_reference is None and self._pristine is None):
            return 0
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def state(self, slot: int) -> dict[str, Tensor]:
        """Weights and optimizer, CPU copies."""
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
        """An adapter folder that `peft` loads, or a model folder that `transformers` loads."""
        folder.mkdir(parents=True, exist_ok=True)
        owned = self._slots[slot]
        if owned.adapter is None:
            self.model.save_pretrained(folder)
            return
        weights = get_peft_model_state_dict(self.peft, adapter_name=owned.adapter)
        tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = copy.copy(self.peft.peft_config[owned.adapter])
        config.inference_mode = True
        config.base_model_name_or_path = self.model.config._name_or_path  # peft sets it for its first adapter only
        config.save_pretrained(folder)

    def _open_adapter(self, name: str, adapter: AdapterConfig, *, seed: int) -> dict[str, nn.Parameter]:
        target = adapter.target if isinstance(adapter.target, str) else list(adapter.target)
        lora = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, target_modules=target, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # peft draws A from the global CPU generator
            if self.peft is None:
                self.peft = get_peft_model(self.model, lora, adapter_name=name)
            else:
                if name in self.peft.peft_config:
                    self.peft.delete_adapter(name)
                self.peft.add_adapter(name, lora)
        self.peft.set_adapter(name)
        # The adapter's name stands inside (`.lora_A.slot0.weight`) or, on an embedding, last (`.lora_embedding_A.slot0`).
        named = {f"{full}.": parameter for full, parameter in self.model.named_parameters()}
        own = {full: parameter for full, parameter in named.items() if f".{name}." in full}
        if own.keys() != {full for full, parameter in named.items() if parameter.requires_grad}:
            raise RuntimeError(f"peft trains other parameters than those named after {name}")
        return {full.replace(f".{name}.", ".").removesuffix("."): parameter for full, parameter in own.items()}

    def _open_full(self, slot: int) -> dict[str, nn.Parameter]:
        if slot != 0:
            raise ValueError("full fine-tuning has one slot")
        parameters = dict(self.model.named_parameters())
        if self._pristine is None:
            self._pristine = {name: p.detach().cpu().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.requires_grad_(requires_grad=True)
                parameter.grad = None
                parameter.copy_(self._pristine[name])
        return parameters

    def _reference_model(self) -> PreTrainedModel:
        if self._reference is None:
            if self._make_reference is not None:
                self._reference = self._make_reference()
            else:
                self._reference = copy.deepcopy(self.model)
                with torch.no_grad():
                    for name, parameter in self._reference.named_parameters():
                        parameter.requires_grad_(requires_grad=False)
                        parameter.copy_(self._pristine[name])
        return self._reference


def _make_optimizer(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    values = list(parameters.values())
    if config.kind == "sgd":
        return torch.optim.SGD(values, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(values, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.float()) for t in tensors]))
