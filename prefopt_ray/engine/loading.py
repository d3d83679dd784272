"""Base models from a local folder or the hub: weights in safetensors only, a start adapter merged in
float32, and a content digest that names exactly what was loaded. Loading errors say what to fix.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast

from prefopt_ray.errors import ModelError, Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSource:
    """A causal LM: hub id or local folder, and adapters to merge into it, in order."""

    model: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class LoadedModel:
    model: PreTrainedModel  # evaluation mode, no dropout
    digest: str  # over weights, configuration and merged adapters
    commit: str | None  # of the hub repository, where it came from there


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(source.model, revision=source.revision)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(_cannot_load("tokenizer", source, error)) from error


def load_model(source: ModelSource, *, device: torch.device, weights_dtype: str | None = None) -> LoadedModel:
    """The model with its adapters merged in float32, cast to `weights_dtype` (default: the source's dtype).

    Raises ModelError when the folder or hub id cannot be read, is no causal LM, or an adapter does not fit.
    """
    target = DTYPES[weights_dtype or source.dtype]
    first = torch.float32 if source.adapters else target
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.model, revision=source.revision, dtype=first, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(_cannot_load("model", source, error)) from error
    for adapter in source.adapters:
        model = _merge(model, adapter)
    model = model.to(device=device, dtype=target).eval()
    model.config.use_cache = False
    return LoadedModel(model, source_digest(source, model), getattr(model.config, "_commit_hash", None))


def check_tokens_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, largest_id: int) -> None:
    """Raise ModelError when the pairs hold a token id that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(Problem(
            place=str(model.config._name_or_path), key="model.policy", found=f"token id {largest_id}",
            rule=f"the model has embeddings for {rows} tokens, its tokenizer ({len(tokenizer)} tokens) has more",
            fix="use the tokenizer the model was trained with, or a model whose embeddings were resized",
        ))


def source_digest(source: ModelSource, model: PreTrainedModel | None = None) -> str:
    """Names the weights: the hub commit, or a hash of every weight file of a local folder; and each adapter's."""
    digest = hashlib.sha256()
    for place in (source.model, *source.adapters):
        digest.update(_place_digest(place, source.revision if place == source.model else None, model).encode())
    return digest.hexdigest()[:32]


def decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The decoder, and a function from its hidden states (n, d) to logits (n, V).

    Most heads are one linear. Some models scale or cap what comes out of it (Gemma 2, Cohere, Granite):
    for those the model's own forward is run on the given states. Checked against the model's own logits.
    """
    decoder = model.get_decoder()
    linear = model.get_output_embeddings()
    candidates = [lambda states: linear(states), lambda states: _tail_logits(model, decoder, states)]
    with torch.no_grad():
        ids = torch.arange(1, 9, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
        own = model(input_ids=ids).logits[0].float()
        states = decoder(input_ids=ids).last_hidden_state[0]
        for head in candidates:
            logits = head(states).float()
            if logits.shape == own.shape and (logits - own).abs().max() <= 0.02 * own.abs().max():
                return decoder, head
    raise ModelError(Problem(
        place=str(model.config._name_or_path), key="model.policy", found=type(model).__name__,
        rule="its logits cannot be computed from its decoder's hidden states", fix="use a causal language model",
    ))


def _tail_logits(model: PreTrainedModel, decoder: nn.Module, states: Tensor) -> Tensor:
    """Whatever the model does after its decoder, applied to `states` (n, d)."""
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=states[None])
    try:
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        return model(input_ids=ids).logits[0]
    finally:
        del decoder.forward  # the class's own forward shows again


def _merge(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(Problem(
            place=adapter, key="model.start_adapter", found="", rule=f"the adapter cannot be merged: {_first_line(error)}",
            fix="give a folder with adapter_config.json and adapter_model.safetensors made for this base model",
        )) from error


def _cannot_load(what: str, source: ModelSource, error: Exception) -> Problem:
    folder = Path(source.model).expanduser()
    if folder.is_dir():
        names = {p.name for p in folder.iterdir()}
        fix = "the folder needs config.json, *.safetensors and tokenizer files"
        if "config.json" in names:
            fix = f"{_architecture(folder)}; it needs *.safetensors weights and tokenizer files"
    elif source.model.startswith((".", "/", "~")):
        fix = "no such folder"
    else:
        fix = "a hub id needs the network once (HF_TOKEN for gated models) or a filled cache; or give a local folder"
    return Problem(place=source.model, key="model", found="", rule=f"the {what} cannot be loaded: {_first_line(error)}", fix=fix)


def _architecture(folder: Path) -> str:
    try:
        return f"config.json says {AutoConfig.from_pretrained(folder).model_type!r}"
    except (OSError, ValueError, KeyError, json.JSONDecodeError):
        return "config.json cannot be read"


def _place_digest(place: str, revision: str | None, model: PreTrainedModel | None) -> str:
    folder = Path(place).expanduser()
    if not folder.is_dir():
        commit = getattr(model.config, "_commit_hash", None) if model is not None else None
        return f"{place}@{commit or revision}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode())
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
