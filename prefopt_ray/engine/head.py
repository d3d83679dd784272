"""Log-probs of completion tokens from hidden states: logits only where a completion token is predicted,
in chunks, reduced in float32. Memory does not grow with vocabulary x length.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefopt_ray.engine.batches import Batch

Head = Callable[[Tensor], Tensor]  # (n, d) hidden -> (n, V) logits

# Logits held at once: 128 MiB in float32 beside a CPU's cache, 1 GiB on a GPU, which must not wait for small products.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


def chunk_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"])


def chunk_bytes(device: torch.device) -> int:
    """What a chunk takes at most: logits, their softmax, their gradient."""
    return 3 * 4 * chunk_elements(device)


def completion_logps(hidden: Tensor, batch: Batch, *, head: Head, vocabulary: int) -> Tensor:
    """(N,) float32 log-probs of the completion tokens at the batch's positions; `hidden` is (R, T, d)."""
    return _in_chunks(partial(_token_logps, head), (_at_positions(hidden, batch), batch.targets), vocabulary=vocabulary)


def token_square_sums(hidden: Tensor, batch: Batch, *, head: Head, vocabulary: int) -> Tensor:
    """(N,) log of the sum over the vocabulary of the squared probabilities at each position. No gradient."""
    with torch.no_grad():
        return _in_chunks(partial(_log_square_sum, head), (_at_positions(hidden, batch),), vocabulary=vocabulary)


def reference_divergences(
    policy_hidden: Tensor, reference_hidden: Tensor, batch: Batch, *, heads: tuple[Head, Head], vocabulary: int
) -> Tensor:
    """(N,) KL(ref || pi) in nats at each position, differentiable in the policy."""
    states = (_at_positions(policy_hidden, batch), _at_positions(reference_hidden, batch))
    return _in_chunks(partial(_reference_divergence, heads), states, vocabulary=3 * vocabulary)


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """(N,) values at the batch's positions -> (R,) sums over each completion.

    Laid out by completion and summed, not index_add: that adds in no fixed order on a GPU.
    """
    width = batch.longest
    by_row = torch.zeros(batch.row_count * width, dtype=values.dtype, device=values.device)
    return by_row.index_copy(0, batch.rows * width + batch.places, values).view(batch.row_count, width).sum(1)


def divergence_sums(
    policy_hidden: Tensor, reference_hidden: Tensor, batch: Batch, *, heads: tuple[Head, Head], vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(R,) KL(pi || ref) and (R,) entropy of pi, summed over each completion's positions, in nats."""
    policy = policy_hidden.reshape(-1, policy_hidden.shape[-1])[batch.positions]
    reference = reference_hidden.reshape(-1, reference_hidden.shape[-1])[batch.positions]
    kl = torch.zeros(batch.row_count, device=policy.device)
    entropy = torch.zeros_like(kl)
    chunk = max(1, chunk_elements(policy.device) // (3 * vocabulary))
    for start in range(0, len(policy), chunk):
        span = slice(start, start + chunk)
        log_pi = torch.log_softmax(heads[0](policy[span]).float(), dim=-1)  # (n, V)
        log_ref = torch.log_softmax(heads[1](reference[span]).float(), dim=-1)
        pi = log_pi.exp()
        kl.index_add_(0, batch.rows[span], (pi * (log_pi - log_ref)).sum(-1))
        entropy.index_add_(0, batch.rows[span], -(pi * log_pi).sum(-1))
    return kl, entropy


def _at_positions(hidden: Tensor, batch: Batch) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])[batch.positions]  # (N, d)


def _in_chunks(compute: Callable[..., Tensor], columns: tuple[Tensor, ...], *, vocabulary: int) -> Tensor:
    """`compute` over rows of the columns, (N,), never holding more than a chunk of logits."""
    rows, most = len(columns[0]), chunk_elements(columns[0].device)
    chunk = max(1, most // vocabulary)
    # A single small chunk is cheaper to keep than to compute twice.
    recompute = torch.is_grad_enabled() and rows * vocabulary > most // 8
    pieces = []
    for start in range(0, rows, chunk):
        part = tuple(column[start : start + chunk] for column in columns)
        if recompute:
            pieces.append(checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(compute(*part))
    return torch.cat(pieces)


def _token_logps(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    logits = head(states).float()  # (n, V)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _log_square_sum(head: Head, states: Tensor) -> Tensor:
    logits = head(states).float()
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def _reference_divergence(heads: tuple[Head, Head], policy: Tensor, reference: Tensor) -> Tensor:
    with torch.no_grad():
        log_ref = torch.log_softmax(heads[1](reference).float(), dim=-1)  # (n, V)
    log_pi = torch.log_softmax(heads[0](policy).float(), dim=-1)
    return (log_ref.exp() * (log_ref - log_pi)).sum(-1)
