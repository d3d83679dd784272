"""Which engine trains a model, and why: decided from its configuration and the adapter before weights are read.

The flat engine serves the families that its exactness tests pass on. Whatever it does not serve trains on the
plain engine with the same results to rounding, only slower.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from prefopt_ray.engine.agreement import follows_the_batch
from prefopt_ray.engine.flat.attention import NAME, attention_kernel
from prefopt_ray.engine.flat.engine import FlatEngine, LayoutError
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.trial import AdapterConfig, ExecutionPlan

FLAT, PLAIN = "flat", "plain"
ROWS = "rows"  # the plain engine with a row for each completion: what every other layout is compared with
# As a configuration's `model_type`; each has its line in tests/engine/test_flat_families.py.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3",
    "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4",
    "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "ministral3", "olmo", "olmo2", "olmo3", "phi", "phi3",
    "seed_oss", "smollm3", "starcoder2",
)
HEAD = "lm_head"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineChoice:
    """An engine's name and the reason, one line for people."""

    engine: str  # flat | plain | rows
    reason: str


def choose_engine(wanted: str, config: PretrainedConfig, adapter: AdapterConfig) -> EngineChoice:
    """`wanted` is auto or plain."""
    if wanted == PLAIN:
        return EngineChoice(PLAIN, "the spec asks for it")
    obstacle = _obstacle(config, adapter)
    if obstacle:
        return EngineChoice(PLAIN, obstacle)
    return EngineChoice(FLAT, f"{config.model_type} is served: no padding, each prompt computed once per pair")


def open_engine(
    choice: EngineChoice,
    model: PreTrainedModel,
    *,
    plan: ExecutionPlan,
    pad_id: int,
    eos_ids: tuple[int, ...],
    autocast: torch.dtype | None = None,
    separate_reference: Callable[[], PreTrainedModel] | None = None,
) -> LocalEngine:
    """The chosen engine; the plain one, with a warning, where the loaded model turns out not to take flat batches.

    `plan.engine`, `plan.reason` and `plan.attention` become what was opened.
    """
    own_attention = str(model.config._attn_implementation)
    settings: dict[str, object] = {
        "pad_id": pad_id, "eos_ids": eos_ids, "autocast": autocast, "separate_reference": separate_reference,
    }
    if choice.engine == FLAT:
        flat = replace(plan, engine=FLAT, reason=choice.reason, attention=f"{NAME}/{attention_kernel(model.device)}")
        try:
            return FlatEngine(model, plan=flat, **settings)
        except LayoutError as error:
            choice = EngineChoice(PLAIN, f"this {model.config.model_type} is not served: {error}")
            log.warning("plain engine: %s", choice.reason)
    plain = replace(plan, engine=PLAIN, reason=choice.reason, attention=own_attention)
    if choice.engine == ROWS:
        settings["share_prompt"] = False
    return PlainEngine(model, plan=plain, **settings)


def _obstacle(config: PretrainedConfig, adapter: AdapterConfig) -> str:
    """Why the flat engine cannot serve it; empty when it can."""
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not among the {len(FAMILIES)} families that the flat engine is tested with"
    if follows_the_batch(config):
        return f"its rotary frequencies ({follows_the_batch(config)}) depend on the longest row of a batch"
    if adapter.kind == "qlora" or getattr(config, "quantization_config", None):
        return "the base model is quantised: its linears are computed by the package that packed them"
    if adapter.kind != "none" and _is_target(HEAD, adapter.target):
        return "a LoRA on the head changes every logit"
    return ""


def _is_target(module: str, target: str | tuple[str, ...]) -> bool:
    """As peft reads it: a pattern for the whole name, or names that end so. `all-linear` leaves the head out."""
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)
