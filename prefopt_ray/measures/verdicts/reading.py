"""What a rule read: the numbers it compared, with what, and whether it fired.

`prefopt explain` prints them, fired or not. Knows no rule.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass

_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Check:
    """One comparison: `value` `sign` `limit`. A value of None was not measured, and is not met."""

    name: str
    value: float | None
    sign: str  # > | >= | < | <=
    limit: float
    threshold: str = ""  # the field of Thresholds behind the limit
    step: int | None = None  # where the value was read; None = over the whole history

    @property
    def met(self) -> bool:
        return self.value is not None and bool(_COMPARE[self.sign](self.value, self.limit))


@dataclass(frozen=True)
class Sign:
    """One way in which a rule can fire; it did where there is an onset."""

    checks: tuple[Check, ...] = ()
    onset_step: int | None = None
    evidence: str = ""  # one clause with the numbers


@dataclass(frozen=True)
class Reading:
    """A rule on a history. `onset_step` and `evidence` are there when it fired."""

    rule: str
    fired: bool
    checks: tuple[Check, ...]
    onset_step: int | None = None
    evidence: str = ""


def reading(rule: str, signs: Iterable[Sign]) -> Reading:
    """A rule fires when any of its signs is there; the earliest is its onset and evidence."""
    signs = tuple(signs)
    checks = tuple(check for sign in signs for check in sign.checks)
    found = [sign for sign in signs if sign.onset_step is not None]
    if not found:
        return Reading(rule, fired=False, checks=checks)
    first = min(found, key=lambda sign: sign.onset_step)
    return Reading(rule, fired=True, checks=checks, onset_step=first.onset_step, evidence=first.evidence)
