"""Log-probs of completion tokens through a frozen linear head, with the gradient computed in the forward pass.

d log p(y | h) / dh = W[y] - softmax(h W^T) W needs nothing from above, so each chunk of logits gives value and slope
at once and is dropped: two products instead of three, no logits kept, and any loss of per-token log-probs on top.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits held at once: with fewer the products read the head's weights too often (on a CPU 64 rows instead of
# 512 cost a quarter more at 8,192 tokens of vocabulary and a third more at 152,000), and 2,048 of those are 1.2 GB in float32.
CHUNK_ROWS = {"cpu": 512, "cuda": 2_048}


def chunk_bytes(weight: Tensor) -> int:
    """What a chunk of logits takes at most: itself and the exponentials of its sum; `weight` is (V, d)."""
    return _chunk_rows(weight.device) * weight.shape[0] * 2 * _wide(weight.dtype).itemsize


class FrozenHeadLogps(torch.autograd.Function):
    """(N,) float32 log-probs of `targets`, differentiable in the hidden states only."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        """states (N, d), weight (V, d), bias (V,) or None, targets (N,) int64."""
        logps = torch.empty(len(states), dtype=_wide(states.dtype), device=states.device)
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        chunk = _chunk_rows(states.device)
        for start in range(0, len(states), chunk):
            span = slice(start, start + chunk)
            logits = torch.nn.functional.linear(states[span], weight, bias).to(logps.dtype)  # (n, V)
            total = logits.logsumexp(-1, keepdim=True)
            wanted = targets[span, None]
            logps[span] = (logits.gather(-1, wanted) - total)[:, 0]
            if slopes is not None:
                shares = logits.sub_(total).exp_()
                shares.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=shares.dtype))
                torch.mm(shares.to(weight.dtype), weight, out=slopes[span])
                del shares
            del logits  # before the next chunk's are made
        if slopes is not None:
            ctx.save_for_backward(slopes.neg_())
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        # One factor for all tokens of a completion: rounded before the product it would weigh the whole pair wrongly.
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None


def _chunk_rows(device: torch.device) -> int:
    return CHUNK_ROWS.get(device.type, CHUNK_ROWS["cpu"])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)
