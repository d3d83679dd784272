"""A linear layer with a LoRA in two passes over its output: the product, and the adapter added inside its product.

peft's own makes about six (down, up, scale, add, two casts). Frozen base, float32 adapter weights computed in the
base's dtype; parameters, their names and their start stay peft's.
"""

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class LoraProduct(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T; gradients of x, A and B only.

    On a list of tokens: shapes are the caller's, since autograd forbids changing in place (OLMo clips so) what a
    function of its own returned as a view.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor,
        b: Tensor, scaling: float,
    ) -> Tensor:
        """rows (S, d), weight (o, d), a (r, d), b (o, r) -> (S, o)."""
        a_cast, b_cast = a.to(rows.dtype), b.to(rows.dtype)
        down = rows @ a_cast.T  # (S, r)
        out = linear(rows, weight, bias).addmm_(down, b_cast.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, a_cast, b_cast, down)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, pull: Tensor) -> tuple[Tensor | None, ...]:
        """pull (S, o)."""
        rows, weight, a, b, down = ctx.saved_tensors
        pull_down = (pull @ b).mul_(ctx.scaling)  # (S, r)
        grad_rows = (pull @ weight).addmm_(pull_down, a) if ctx.needs_input_grad[0] else None
        grad_a = (pull_down.T @ rows).to(ctx.dtypes[0])
        grad_b = (pull.T @ down).mul_(ctx.scaling).to(ctx.dtypes[1])
        return grad_rows, None, None, grad_a, grad_b, None


def use_two_passes(model: PeftModel) -> None:
    """Let every LoRA linear of the model compute so; which adapter is active, or none, it asks at each call."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = _Forward(module)


class _Forward:
    """The forward of one layer."""

    def __init__(self, layer: LoraLayer) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        base = layer.base_layer
        if layer.disable_adapters:
            return linear(x, base.weight, base.bias)
        (name,) = layer.active_adapters
        if name not in layer.lora_A:
            return linear(x, base.weight, base.bias)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        out = LoraProduct.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, layer.scaling[name])
        return out.view(*x.shape[:-1], out.shape[-1])
