"""Floating-point operations of one optimizer step with a LoRA on every linear, in closed form.

`necessary_flops` is what the mathematics asks for, whoever computes it: a share of the machine's peak on it cannot be
made larger by wasting work. `padded_flops` is what rows with the prompt twice, padded to the longest, cost. A multiply
and an add count two; norms, activations, softmax and the optimizer are left out (below 2 % at these widths).
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.model_shapes import ModelShape


def necessary_flops(shape: ModelShape, lengths: np.ndarray, *, rank: int) -> float:
    """Of all pairs of `lengths` (N, 3: prompt, chosen, rejected tokens), each prompt computed once, nothing padded.

    Frozen linears: forward, and backward for the input's gradient; adapters: forward, and backward for input and
    weights. Not counted, because not needed: gradients below the first adapters; the last layer's output projection
    and MLP where nothing is predicted; logits of prompt tokens; a completion's last token, which only is predicted.
    Attention is causal, its backward twice its forward. The head: logits once, and the hidden states' gradient; a
    prompt's last token predicts the first one of both completions. The reference is not in it: it is computed once for
    all trials.
    """
    prompt, chosen, rejected = (lengths - [0, 1, 1]).astype(np.float64).T
    tokens, answers = float((prompt + chosen + rejected).sum()), float((chosen + rejected + 1).sum())
    seen = float((prompt**2 / 2 + prompt * (chosen + rejected) + (chosen**2 + rejected**2) / 2).sum())
    late = ("o", "gate", "up", "down")  # of the last layer: nothing after them looks at a prompt token
    per_token = sum(_linear(size, rank) for size in shape.linears.values())
    on_answers = sum(_linear(shape.linears[name], rank) for name in late)
    first = sum(_input_gradient(shape.linears[name], rank) for name in ("q", "k", "v"))
    body = shape.layers * per_token * tokens - on_answers * (tokens - answers) - first * tokens
    attention = shape.layers * 3 * 4 * shape.hidden * seen
    head = 2 * 2 * shape.hidden * shape.vocabulary * answers
    return body + attention + head


@dataclass(frozen=True)
class PaddedStep:
    """What a step over padded rows computes beside policy forward and backward."""

    reference: bool  # the reference's forward, at every step
    recomputed: bool  # gradient checkpointing: each layer's forward again in the backward pass
    scores_padding: bool  # the head also scores prompts and padding (TRL's path without Triton)


def padded_flops(
    shape: ModelShape, lengths: np.ndarray, *, rank: int, batch: int, step: PaddedStep
) -> float:
    """Of all pairs of `lengths` (N, 3) in batches of `batch`: two rows per pair, padded to the batch's longest.

    The head is TRL 1.16's: logits in the forward, again in the backward, and the hidden states' gradient.
    """
    total = 0.0
    for start in range(0, len(lengths), batch):
        part = lengths[start : start + batch].astype(np.float64)
        width = float((part[:, 0] + part[:, 1:].max(1)).max())
        total += _padded_batch(shape, 2 * len(part), width, float(part[:, 1:].sum()), rank=rank, step=step)
    return total


def shared_rows_flops(shape: ModelShape, lengths: np.ndarray, *, rank: int, batch: int) -> float:
    """Of all pairs of `lengths` (N, 3) in batches of `batch`: one row per pair with its prompt once, padded to the
    batch's longest; attention computes whole squares, since its mask is a matrix. As `PlainEngine` does."""
    plain = PaddedStep(reference=False, recomputed=False, scores_padding=False)
    total = 0.0
    for start in range(0, len(lengths), batch):
        part = lengths[start : start + batch].astype(np.float64)
        width = float((part.sum(1) - 2).max())
        total += _padded_batch(shape, len(part), width, float(part[:, 1:].sum()), rank=rank, step=plain, causal=False)
    return total


def _padded_batch(
    shape: ModelShape, rows: int, width: float, answers: float, *, rank: int, step: PaddedStep, causal: bool = True
) -> float:
    tokens = rows * width
    frozen = shape.layers * sum(2 * i * o for i, o in shape.linears.values()) * tokens
    adapters = shape.layers * sum(2 * rank * (i + o) for i, o in shape.linears.values()) * tokens
    attention = shape.layers * 4 * shape.hidden * rows * width**2 / (2 if causal else 1)
    forward = frozen + adapters + attention
    backward = frozen + 2 * adapters + 2.5 * attention
    reference = (frozen + attention) if step.reference else 0.0
    logits = 2 * shape.hidden * shape.vocabulary * (tokens if step.scores_padding else answers)
    return forward * (2 if step.recomputed else 1) + backward + reference + logits * (3 + step.reference)


def _linear(size: tuple[int, int], rank: int) -> float:
    """Forward and backward of one token through a frozen linear with an adapter."""
    return 4 * size[0] * size[1] + 6 * rank * sum(size)


def _input_gradient(size: tuple[int, int], rank: int) -> float:
    """The part of it that is the gradient of the input: through the weight, and through the adapter's first factor."""
    return 2 * size[0] * size[1] + 2 * rank * size[0]
