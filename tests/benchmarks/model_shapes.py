"""Shapes of the models that are timed, and random weights of them. Nothing is downloaded.

A benchmark needs a model's exact arithmetic, not its knowledge.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config


@dataclass(frozen=True)
class ModelShape:
    """A decoder with grouped-query attention and a gated MLP, in the field's letters."""

    name: str
    layers: int  # L
    hidden: int  # d
    intermediate: int  # I
    heads: int
    kv_heads: int
    vocabulary: int  # V
    family: Literal["llama", "qwen2"] = "llama"
    tied: bool = False  # the head is the embedding

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv(self) -> int:
        """Width of keys, and of values."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (in, out) of one layer's seven linears; all of them carry a LoRA here."""
        d, kv, wide = self.hidden, self.kv, self.intermediate
        return {
            "q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, wide), "up": (d, wide), "down": (wide, d),
        }


def _small(vocabulary: int) -> ModelShape:
    return ModelShape(f"small-{vocabulary // 1000}k", 4, 256, 688, 4, 2, vocabulary)


MODELS = {
    shape.name: shape
    for shape in (
        _small(8192),
        _small(32000),
        ModelShape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 151936, "qwen2", tied=True),
        ModelShape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 128256, tied=True),
        ModelShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 152064, "qwen2"),
    )
}


def model_config(shape: ModelShape, *, longest: int = 2048) -> PretrainedConfig:
    """The shape as transformers knows it. Token 0 pads, 2 ends."""
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family]
    return kind(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=longest, tie_word_embeddings=shape.tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )


def random_model(
    shape: ModelShape, *, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Random weights (standard deviation 0.02), made where they stay, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype).eval()
