"""Intervals of a proportion such as a win rate. Knows nothing of judges, policies or prompts.

Wilson's score interval (1927), method 3 of Newcombe 1998, "Two-sided confidence intervals for the single
proportion": unlike p -+ 2 sqrt(p(1-p)/n) it stays inside [0, 1] and has a width at 0 and at n wins.
"""

import math
from statistics import NormalDist


def wilson_interval(wins: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of the chance to win, from `wins` of `n` independent comparisons; a tie is half a win.

    Ties vary less than the coin this assumes, so with ties the interval is a little too wide, never too narrow.
    Without comparisons it is (0, 1): nothing is known. Raises ValueError unless 0 <= wins <= n and
    0 < confidence < 1.
    """
    if not 0 <= wins <= n:  # also refuses NaN
        raise ValueError(f"wins must be between 0 and n, got {wins} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (wins + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(wins * (n - wins) / n + z * z / 4)
    # The ends are exact at 0 and at n wins; rounding would leave 1e-17 there.
    return (0.0 if wins == 0 else centre - half), (1.0 if wins == n else centre + half)
