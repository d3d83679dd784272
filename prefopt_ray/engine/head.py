"""Log-probs of completion tokens from hidden states: logits only where a completion token is predicted,
in chunks, reduced in float32. Memory does not grow with vocabulary x length.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefopt_ray.engine.batches import SequenceBatch

Head = Callable[[Tensor], Tensor]  # (n, d) hidden -> (n, V) logits

CHUNK_ELEMENTS = 2**25  # logits held at once; 128 MiB in float32


def completion_logps(hidden: Tensor, batch: SequenceBatch, *, head: Head, vocabulary: int) -> Tensor:
    """(R,) float32 summed log-probs of each sequence's completion; `hidden` is (R, T, d)."""
    states = hidden.reshape(-1, hidden.shape[-1])[batch.positions]  # (N, d)
    chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    # A single small chunk is cheaper to keep than to compute twice.
    recompute = torch.is_grad_enabled() and len(states) * vocabulary > CHUNK_ELEMENTS // 8
    pieces = []
    for start in range(0, len(states), chunk):
        part = (states[start : start + chunk], batch.targets[start : start + chunk], head)
        if recompute:
            pieces.append(checkpoint(_token_logps, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(_token_logps(*part))
    logps = torch.cat(pieces)  # (N,)
    # Laid out by row and summed, not index_add: that adds in no fixed order on a GPU.
    by_row = torch.zeros(batch.input_ids.numel(), device=logps.device).index_copy(0, batch.positions, logps)
    return by_row.view(batch.input_ids.shape).sum(1)


def divergence_sums(
    policy_hidden: Tensor, reference_hidden: Tensor, batch: SequenceBatch, *, heads: tuple[Head, Head], vocabulary: int
) -> tuple[Tensor, Tensor]:
    """(R,) KL(pi || ref) and (R,) entropy of pi, summed over each completion's positions, in nats."""
    policy = policy_hidden.reshape(-1, policy_hidden.shape[-1])[batch.positions]
    reference = reference_hidden.reshape(-1, reference_hidden.shape[-1])[batch.positions]
    kl = torch.zeros(batch.row_count, device=policy.device)
    entropy = torch.zeros_like(kl)
    chunk = max(1, CHUNK_ELEMENTS // (3 * vocabulary))
    for start in range(0, len(policy), chunk):
        span = slice(start, start + chunk)
        log_pi = torch.log_softmax(heads[0](policy[span]).float(), dim=-1)  # (n, V)
        log_ref = torch.log_softmax(heads[1](reference[span]).float(), dim=-1)
        pi = log_pi.exp()
        kl.index_add_(0, batch.rows[span], (pi * (log_pi - log_ref)).sum(-1))
        entropy.index_add_(0, batch.rows[span], -(pi * log_pi).sum(-1))
    return kl, entropy


def _token_logps(states: Tensor, targets: Tensor, head: Head) -> Tensor:
    logits = head(states).float()  # (n, V)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
