"""How many tokens one forward pass with gradients may hold: measured on the model itself, not guessed.

On a GPU the limit is memory: what autograd keeps per token, counted on two pairs, a short and a long one. On a CPU it is the cache, and
the execution plan's own default: measured on two cores, 1,024 to 2,048 tokens a pass are 20 to 30 % faster than 16,384.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOKENS_WITHOUT_GRADIENT = {"cpu": 2_048, "cuda": 32_768}
MOST_TOKENS = 32_768  # a GPU's products are as fast as they get well before that
USABLE = 0.7  # of what is free: fragmentation, one layer's backward pass, kernels' workspaces
GRADIENT_AND_MOMENTS = 3  # copies of the trainable weights that a first AdamW step adds


def scoring_tokens(device: str) -> int:
    """Of one forward without gradients; `device` is cpu or cuda."""
    return TOKENS_WITHOUT_GRADIENT[device]


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of a forward pass for the backward pass, in bytes."""

    constant: float  # whatever the batch: copies of weights in another precision
    per_token: float

    @classmethod
    def of(cls, short: tuple[int, int], long: tuple[int, int]) -> "Kept":
        """From two measured passes, each (tokens, bytes)."""
        (few, little), (many, much) = short, long
        per_token = max(0, much - little) / (many - few)
        return cls(max(0.0, little - few * per_token), per_token)


def training_bytes(trainable: Iterable[nn.Parameter]) -> int:
    """Of gradients and AdamW's moments, which the first step makes."""
    return GRADIENT_AND_MOMENTS * sum(p.numel() * p.element_size() for p in trainable)


def tokens_in_memory(device: torch.device, *, bytes_per_token: float, coming: float) -> int:
    """Tokens whose activations fit into what is free on a CUDA device now, beside the bytes that are still to come."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved  # others have their shares
    free = min(free, allowed) + reserved - torch.cuda.memory_allocated(device)
    return max(1, int(USABLE * (free - coming) / bytes_per_token))


def budget(fitting: int) -> int:
    """Tokens of one forward with gradients: a power of two, so that a little more free memory changes no bits."""
    return min(MOST_TOKENS, 2 ** (fitting.bit_length() - 1))


def kept_bytes(compute: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> int:
    """What autograd keeps of `compute` for the backward pass, weights aside; a tensor kept twice counts once."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    total = sum(kept.values())  # while `result` keeps them alive: a freed address could be counted twice
    del result
    return total
