"""What some losses need beyond the log-probs of their pairs, as pairs of their own that any engine can score.

A log-prob of the first k tokens is the log-prob of a completion cut to k tokens; a mismatched pair is this row's
prompt with another row's completions. So the reference store serves them like any other pairs. Knows no model.
"""

from collections.abc import Callable

import numpy as np

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.pairs.tokens import PairTokens, Ragged


def cut_to_shorter(pairs: PairTokens) -> PairTokens:
    """Both completions cut to the tokens of the shorter one."""
    shorter = np.minimum(pairs.chosen.lengths, pairs.rejected.lengths)
    return _with_completions(pairs, _cut(pairs.chosen, shorter), _cut(pairs.rejected, shorter))


def mismatched(pairs: PairTokens) -> PairTokens:
    """Each prompt with the completions of the next row that has another prompt, cut to fit the longest pair.

    The partner depends on the order of the rows only, so its reference log-probs can be stored. Raises DataError
    when all rows share one prompt.
    """
    partners = _partners(pairs.groups)
    room = np.maximum(1, int(pairs.longest.max()) - pairs.prompt.lengths)
    return _with_completions(
        pairs, _cut(pairs.chosen.take(partners), room), _cut(pairs.rejected.take(partners), room)
    )


# What a card may need -> the pairs whose reference log-probs it takes.
DERIVED: dict[str, Callable[[PairTokens], PairTokens]] = {"per_token": cut_to_shorter, "mismatched": mismatched}


def _partners(groups: np.ndarray) -> np.ndarray:
    """(N,) for each row the next one, in a circle, of another group."""
    if len(np.unique(groups)) < 2:
        raise DataError(Problem(
            place="train part", key="data.train", found="one prompt for all pairs",
            rule="a loss that compares with mismatched completions needs at least two prompts", fix="use another loss",
        ))
    following = np.empty(len(groups), dtype=np.int64)
    target = -1
    for row in range(2 * len(groups) - 1, -1, -1):  # twice round, so that the last rows find the first
        here, after = row % len(groups), (row + 1) % len(groups)
        target = after if groups[after] != groups[here] else target
        if row < len(groups):
            following[row] = target
    return following


def _cut(completions: Ragged, lengths: np.ndarray) -> Ragged:
    return Ragged.from_rows([completions[i][: int(n)] for i, n in enumerate(lengths)])


def _with_completions(pairs: PairTokens, chosen: Ragged, rejected: Ragged) -> PairTokens:
    return PairTokens(pairs.row_ids, pairs.groups, pairs.prompt, chosen, rejected)
