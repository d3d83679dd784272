"""Base models from a local folder or the hub: weights in safetensors only, a start adapter merged in
float32, then cast or quantised, and a digest that names exactly what was loaded. Loading errors say what to fix.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from prefopt_ray.engine.quantised import four_bit_copy, loading_in_four_bits, make_differentiable, require_four_bits
from prefopt_ray.errors import ModelError, Problem

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSource:
    """A causal LM: hub id or local folder, and adapters to merge into it, in order."""

    model: str
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    quantisation: str | None = None  # nf4: linears kept in 4 bits, computed in dtype


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(source.model, revision=source.revision)
    except Exception as error:  # a damaged file raises whatever its content led to; the cause is kept
        raise ModelError(_cannot_load("tokenizer", source, error)) from error


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration, without its weights. Raises ModelError."""
    try:
        return AutoConfig.from_pretrained(source.model, revision=source.revision)
    except Exception as error:  # as above; configurations are checked by classes of their own
        raise ModelError(_cannot_load("model", source, error)) from error


def load_model(source: ModelSource, *, device: torch.device, weights_dtype: str | None = None) -> PreTrainedModel:
    """The model, in evaluation mode, its adapters merged in float32, cast to `weights_dtype` (default: the source's).

    Quantised, where the source says so, after the cast; 4-bit linears alone are in training mode. Raises ModelError
    when the folder or hub id cannot be read, is no causal LM, lacks weights, an adapter does not fit, or it cannot be
    quantised here.
    """
    target = DTYPES[weights_dtype or source.dtype]
    if source.quantisation:
        model = _load_quantised(source, target, device=device)
    else:
        model = (_merged(source, target) if source.adapters else _read(source, dtype=target)).to(device=device)
    model.eval()
    if getattr(model, "is_loaded_in_4bit", False):  # a base may have been stored so, too
        make_differentiable(model)
    return model


def _read(source: ModelSource, **how: Any) -> PreTrainedModel:
    """The model without its adapters, whole; `how` are arguments of transformers' `from_pretrained`."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source.model, revision=source.revision, use_safetensors=True, output_loading_info=True, **how
        )
    except Exception as error:  # as above
        raise ModelError(_cannot_load("model", source, error)) from error
    _require_whole(model, source, missing=sorted(found["missing_keys"]))
    return model


def _merged(source: ModelSource, target: torch.dtype) -> PreTrainedModel:
    model = _read(source, dtype=torch.float32)
    for adapter in source.adapters:
        model = _merge(model, adapter)
    for parameter in model.parameters():  # not model.to(dtype): it rounds the rotary frequencies too, a buffer
        parameter.data = parameter.data.to(target)
    return model


def _load_quantised(source: ModelSource, target: torch.dtype, *, device: torch.device) -> PreTrainedModel:
    require_four_bits()
    if source.adapters:  # whole in host memory until it is merged
        return four_bit_copy(_merged(source, target), target, device=device)
    return _read(source, **loading_in_four_bits(target, device=device))


def check_tokens_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, largest_id: int) -> None:
    """Raise ModelError when the pairs hold a token id that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ModelError(Problem(
            place=str(model.config._name_or_path), key="model.policy", found=f"token id {largest_id}",
            rule=f"the model has embeddings for {rows} tokens, its tokenizer ({len(tokenizer)} tokens) has more",
            fix="use the tokenizer the model was trained with, or a model whose embeddings were resized",
        ))


def check_length_fits(model: PreTrainedModel, *, longest: int) -> None:
    """Raise ModelError when a pair has more tokens than the model has learned positions.

    Rotary positions go on beyond what the model was trained for; that is only warned about.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or longest <= limit:
        return
    if getattr(model.config, "rope_parameters", None) or hasattr(model.config, "rope_theta"):
        log.warning("a pair has %d tokens; %s was made for %d", longest, model.config._name_or_path, limit)
    else:
        raise ModelError(Problem(
            place=str(model.config._name_or_path), key="data.max_tokens", found=f"a pair of {longest} tokens",
            rule=f"the model has {limit} positions", fix=f"set data.max_tokens to {limit} or less",
        ))


def local_adapter(place: str) -> str:
    """An adapter's local folder: itself, or where the hub's files were downloaded to. Raises ModelError."""
    if Path(place).expanduser().is_dir() or place.startswith((".", "/", "~")):
        return place  # a missing folder is named when it is merged
    try:
        return huggingface_hub.snapshot_download(place, allow_patterns=["*.json", "*.safetensors"])
    except (OSError, ValueError) as error:
        raise ModelError(Problem(
            place=place, key="adapter", found="", rule=f"the adapter cannot be downloaded: {_first_line(error)}",
            fix="a hub id needs the network once (HF_TOKEN for private ones); or give a local folder",
        )) from error


def source_digest(source: ModelSource) -> str:
    """Names the weights: a hub id at its commit, or a hash of every weight file of a local folder; each adapter's; and
    how they are quantised (in which precision and by which kernels they compute is not theirs to name)."""
    digest = hashlib.sha256()
    for place in (source.model, *source.adapters):
        digest.update(_place_digest(place, source.revision if place == source.model else None).encode())
    if source.quantisation:
        digest.update(f"quantised/{source.quantisation}".encode())
    return digest.hexdigest()[:32]


def decoder_and_head(model: PreTrainedModel) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The decoder, and a function from its hidden states (n, d) to logits (n, V).

    Most heads are one linear. Some models scale or cap what comes out of it (Gemma 2, Cohere, Granite):
    for those the model's own forward is run on the given states. Raises ModelError when that does not give the
    model's own logits, and when a logit depends on later tokens.
    """
    ids = torch.arange(1, 9, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        own = model(input_ids=ids).logits[0]
        _require_causal(model, ids, own)
        decoder = model.get_decoder()
        outputs = decoder(input_ids=ids)
        states, kind = outputs.last_hidden_state[0], type(outputs)

        def linear(states: Tensor) -> Tensor:
            return model.get_output_embeddings()(states)  # looked up each time: an adapter may be put on it

        def whole(states: Tensor) -> Tensor:
            return _tail_logits(model, decoder, states, kind=kind)

        if not _close(whole(states), own):
            raise ModelError(_not_usable(model, "its logits cannot be computed from its decoder's hidden states"))
        large = 100 * states  # a cap hardly shows on small logits
        return decoder, linear if _close(linear(large), whole(large)) else whole


def _require_causal(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> None:
    """Raise ModelError when another last token changes what is predicted before it.

    At most places: in a mixture of experts it may change the rounding, and so the routing, at one or two.
    """
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    change = (model(input_ids=other).logits[0] - logits).abs().amax(dim=-1)[:-1]  # (positions before the last,)
    if (change > _rounding(logits)).float().mean() > 0.5:
        raise ModelError(_not_usable(model, "its predictions depend on later tokens, as an encoder's do"))


def _not_usable(model: PreTrainedModel, rule: str) -> Problem:
    return Problem(
        place=str(model.config._name_or_path), key="model.policy", found=type(model).__name__, rule=rule,
        fix="use a causal language model",
    )


def _close(logits: Tensor, expected: Tensor) -> bool:
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= _rounding(expected))


def _rounding(logits: Tensor) -> Tensor:
    """What the model's own precision may change in its logits."""
    return 8 * torch.finfo(logits.dtype).eps * logits.abs().max()


def _tail_logits(model: PreTrainedModel, decoder: nn.Module, states: Tensor, *, kind: type[ModelOutput]) -> Tensor:
    """Whatever the model does after its decoder, which answers with a `kind`, applied to `states` (n, d)."""
    decoder.forward = lambda *args, **kwargs: kind(last_hidden_state=states[None])
    try:
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        return model(input_ids=ids).logits[0]
    finally:
        del decoder.forward  # the class's own forward shows again


def _require_whole(model: PreTrainedModel, source: ModelSource, *, missing: list[str]) -> None:
    """Raise ModelError for weights that transformers would fill with random numbers, or an adapter already inside."""
    if missing:
        raise ModelError(Problem(
            place=source.model, key="model", found=f"{len(missing)} weights missing, {missing[0]} first",
            rule="the safetensors must hold every weight that config.json describes",
            fix="download the folder again, or use the causal language model it was made from",
        ))
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(Problem(
            place=source.model, key="model", found="an adapter", rule="a model must be whole weights",
            fix="give its base model here and the adapter as model.start_adapter",
        ))


def _merge(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(_cannot_merge(adapter, f"adapter_model.safetensors is missing in {_listing(folder)}"))
    try:
        place = str(folder) if folder.is_dir() else adapter
        adapted, stored = PeftModel.from_pretrained(model, place), load_peft_weights(place, device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise ModelError(_cannot_merge(adapter, _first_line(error))) from error
    # peft drops what has no place in the model and leaves the rest untrained, with a warning at most.
    held, taken = (sum("lora_" in name for name in names) for names in (stored, get_peft_model_state_dict(adapted)))
    if held != taken:
        raise ModelError(_cannot_merge(adapter, f"it holds {held} tensors and this model has places for {taken}"))
    return adapted.merge_and_unload()


def _cannot_merge(adapter: str, why: str) -> Problem:
    return Problem(
        place=adapter, key="model.start_adapter", found="", rule=f"the adapter cannot be merged: {why}",
        fix="give a folder with adapter_config.json and adapter_model.safetensors made for this base model",
    )


def _cannot_load(what: str, source: ModelSource, error: Exception) -> Problem:
    if source.model.startswith((".", "/", "~")) and not Path(source.model).expanduser().is_dir():
        return Problem(source.model, "model", found="", rule="no such folder", fix="give a model folder or a hub id")
    return Problem(
        place=source.model, key="model", found="", rule=f"the {what} cannot be loaded: {_first_line(error)}",
        fix=_loading_fix(source),
    )


def _loading_fix(source: ModelSource) -> str:
    folder = Path(source.model).expanduser()
    if "://" in source.model:
        return "a hub model is named by its id, such as org/model"
    if not folder.is_dir():
        return "a hub id needs the network once (HF_TOKEN for gated models) or a filled cache; or give a local folder"
    if list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
        return "pickled weights (*.bin) are never read; save the model as safetensors with transformers once"
    if (folder / "config.json").is_file():
        return f"{_architecture(folder)}; it needs *.safetensors weights and tokenizer files"
    return "the folder needs config.json, *.safetensors and tokenizer files"


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "an empty folder"


def _architecture(folder: Path) -> str:
    try:
        return f"config.json says {AutoConfig.from_pretrained(folder).model_type!r}"
    except Exception:  # noqa: BLE001 - only for the words of an error that is being raised
        return "config.json cannot be read"


def _place_digest(place: str, revision: str | None) -> str:
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return f"{place}@{revision}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.name.encode())
            with path.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"no entry {text[0]}"
    return " ".join(line.strip() for line in text[: 2 if text[0].rstrip().endswith(":") else 1])
