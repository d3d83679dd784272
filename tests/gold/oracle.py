"""The gold reward as its definition reads: one completion, one term after the other."""

import math
from itertools import pairwise

from prefopt_ray.gold.language import TOKEN_IDS, chain_logp


def ids(text: str) -> list[int]:
    return [TOKEN_IDS[word] for word in text.split()]


def slow_reward(prompt: list[int], completion: list[int], finished: bool) -> float:
    """r* term by term, as the definition reads."""
    total = float(len(set(prompt) & set(completion)))
    for first, second in pairwise(completion):
        total -= 0.5 * (first == second)
    for token in set(completion):
        total -= 0.5 * max(0, completion.count(token) - 2)
    logps = []
    for first, second in zip([prompt[-1], *completion], completion):
        known = first < 16 and second < 16
        logps.append(chain_logp()[first, second] if known else chain_logp().min())
    if logps:
        total += 0.7 * min(math.fsum(logps) / len(logps) + 3.0, 1.0)
    total -= 0.35 * abs(len(completion) - 8)
    return total - (0.0 if finished else 2.0)
