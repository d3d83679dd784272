"""A base model whose linears are kept in 4 bits (QLoRA, arXiv:2305.14314), for LoRAs on the plain engine.

NF4 with double quantisation by bitsandbytes, an optional extra: the one module that knows of it. On CUDA and on CPU.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from prefopt_ray.errors import ModelError, Problem

NF4 = "nf4"
PACKAGE = "bitsandbytes"


def require_four_bits() -> None:
    """Raise ModelError where the package that computes with 4-bit weights is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ModelError(Problem(
            place="", key="model.adapter.kind", found="qlora",
            rule=f"a 4-bit base needs {PACKAGE}, which is not installed",
            fix="pip install 'prefopt_ray[qlora]' on every machine that trains, or use kind: lora",
        ))


def require_base_fits(config: PretrainedConfig, *, adapter_kind: str, merges: bool) -> None:
    """Raise ModelError for a base stored in few bits where whole weights are needed. `merges`: a start adapter."""
    if not getattr(config, "quantization_config", None):
        return
    if adapter_kind == "qlora":
        rule, fix = "qlora quantises whole weights", "use kind: lora, which trains on the weights as they are stored"
    elif adapter_kind == "none":
        rule, fix = "full fine-tuning needs whole weights", "use kind: lora"
    elif merges:
        rule, fix = "a start adapter is merged in float32", "give the base model that it was quantised from"
    else:
        return
    place = str(config._name_or_path)
    raise ModelError(Problem(place, key="model.policy", found="a quantised model", rule=rule, fix=fix))


def loading_in_four_bits(dtype: torch.dtype, *, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`: linears beside the head in NF4 on the device, all else and the arithmetic in
    `dtype`."""
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": stored, "dtype": dtype, "device_map": {"": str(device)}}


def four_bit_copy(model: PreTrainedModel, dtype: torch.dtype, *, device: torch.device) -> PreTrainedModel:
    """A model in memory as it would be loaded in 4 bits: the same bits as from its file. Raises ModelError."""
    name = model.config._name_or_path
    how = loading_in_four_bits(dtype, device=device)
    try:
        copied = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **how)
    except (ImportError, RuntimeError, ValueError) as error:  # what transformers asks of the machine is not there
        raise ModelError(_not_usable(model, f"it cannot be kept in 4 bits here: {error}")) from error
    copied.config._name_or_path = name  # exported adapters name their base
    return copied


def make_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes to the products that have a gradient. Raises ModelError where they do not give it.

    In evaluation mode on a CPU with AVX512-BF16 its linears repack their weights for good at the first forward
    pass, for a bfloat16 product without a gradient: training then goes on, on a wrong one, with a warning at most.
    """
    from bitsandbytes.nn import Linear4bit

    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not linears:
        raise ModelError(_not_usable(model, "it has no linear layers that can be kept in 4 bits"))
    for linear in linears:
        linear.train()  # how it tells training from inference; a linear drops nothing out
    if not _gives_gradient(linears[0], dtype=model.dtype):
        raise ModelError(_not_usable(model, f"{PACKAGE} gives no gradient through its weights on {model.device.type}"))


def _gives_gradient(linear: nn.Module, *, dtype: torch.dtype) -> bool:
    inputs = torch.ones((2, linear.in_features), dtype=dtype, device=linear.weight.device)
    with torch.no_grad():
        linear(inputs)  # scoring comes before training
    product = linear(inputs.requires_grad_())
    return torch.autograd.grad(product.sum(), inputs, allow_unused=True)[0] is not None


def _not_usable(model: PreTrainedModel, rule: str) -> Problem:
    return Problem(
        place=str(model.config._name_or_path), key="model.adapter.kind", found="qlora", rule=rule, fix="use kind: lora"
    )
