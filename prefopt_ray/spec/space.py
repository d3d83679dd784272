"""Search domains: what one parameter of one loss may be, as written in the spec or usual on its card.

Pure data. Knows the cards' ranges, not how a searcher draws from a domain.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt_ray.losses.cards import LossCard, Range


@dataclass(frozen=True)
class Choices:
    """One of these values; a single number in the spec is one choice."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Uniform:
    """Any number from low to high."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """Any number from low to high, uniform in its logarithm; low > 0."""

    low: float
    high: float


@dataclass(frozen=True)
class Integer:
    """Any whole number from low to high, both included."""

    low: int
    high: int


Domain = Choices | Uniform | LogUniform | Integer
Space = dict[str, Domain]  # parameter (and learning_rate) -> what it may be

LEARNING_RATE = "learning_rate"
GRID_POINTS = 3  # of a card's range under `method: grid`: both ends and the middle show a hump with fewest trials

_RANGES: dict[str, type[Uniform] | type[LogUniform] | type[Integer]] = {
    "log": LogUniform,
    "uniform": Uniform,
    "integer": Integer,
}
_SHAPES = "write a number, a list [a, b], {log: [a, b]}, {uniform: [a, b]} or {integer: [a, b]}"


class DomainError(ValueError):
    """A domain as written breaks a rule; `fix` says what to write."""

    def __init__(self, rule: str, fix: str = _SHAPES) -> None:
        super().__init__(rule, fix)
        self.rule, self.fix = rule, fix


def parse_domain(written: Any) -> Domain:
    """A domain from its YAML shape. Raises DomainError."""
    if isinstance(written, (Choices, Uniform, LogUniform, Integer)):
        return written
    if _is_number(written):
        return Choices((_finite(written),))
    if isinstance(written, (list, tuple)):
        return _choices(list(written))
    if isinstance(written, Mapping):
        return _range(written)
    if isinstance(written, str) and reads_as_number(written):
        raise DomainError("is text, not a number", "remove the quotes")
    raise DomainError("must be numbers to search over")


def write_domain(domain: Domain) -> Any:
    """The YAML shape that `parse_domain` reads back."""
    if isinstance(domain, Choices):
        return domain.values[0] if len(domain.values) == 1 else list(domain.values)
    kind = next(name for name, shape in _RANGES.items() if isinstance(domain, shape))
    return {kind: [domain.low, domain.high]}


def extremes(domain: Domain) -> tuple[float, ...]:
    """The values that decide whether the whole domain keeps a parameter's rule."""
    return domain.values if isinstance(domain, Choices) else (domain.low, domain.high)


def loss_space(
    card: LossCard, own: Mapping[str, Domain], shared: Mapping[str, Domain], *, adapter_kind: str, grid: bool
) -> Space:
    """Every parameter the card reads, then `learning_rate`: the loss's own line, else shared, else the card.

    Under a grid a card's range becomes GRID_POINTS values; a parameter the card does not search keeps its default.
    """
    space: Space = {}
    for param in card.params:
        usual: Domain = _from_card(param.usual, grid=grid) if param.searched else Choices((param.default,))
        space[param.name] = own.get(param.name, shared.get(param.name, usual))
    usual_rate = _from_card(card.learning_rate(adapter_kind), grid=grid)
    space[LEARNING_RATE] = own.get(LEARNING_RATE, shared.get(LEARNING_RATE, usual_rate))
    return space


def grid_points(space: Space) -> Iterator[dict[str, float]]:
    """Every combination, the last parameter fastest. All domains must be Choices (a loaded grid spec's are)."""
    points: list[dict[str, float]] = [{}]
    for name, domain in space.items():
        assert isinstance(domain, Choices), f"{name} is not finite"
        points = [{**point, name: value} for point in points for value in domain.values]
    yield from points


def distinct_points(space: Space) -> float:
    """How many configurations the space holds; inf for a continuous one."""
    return math.prod(_size(domain) for domain in space.values())


def spread(low: float, high: float, *, log: bool) -> tuple[float, ...]:
    """GRID_POINTS values from low to high, the inner ones with two significant digits."""
    shares = [i / (GRID_POINTS - 1) for i in range(1, GRID_POINTS - 1)]
    inner = [low * (high / low) ** t if log else low + t * (high - low) for t in shares]
    return (low, *(two_digits(value) for value in inner), high)


def two_digits(value: float) -> float:
    """Readable in a table, and no range is known better than that."""
    return float(f"{value:.2g}")


def reads_as_number(text: str) -> bool:
    """A number in quotes: without them YAML would read it as one (not so `1_000`, `inf` and full-width digits)."""
    return re.fullmatch(r"\s*[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\s*", text) is not None


def _from_card(usual: Range, *, grid: bool) -> Domain:
    if grid:
        return Choices(spread(usual.low, usual.high, log=usual.log))
    return (LogUniform if usual.log else Uniform)(usual.low, usual.high)


def _choices(written: list[Any]) -> Choices:
    if not written:
        raise DomainError("the list of values is empty", "name at least one value")
    if not all(_is_number(value) for value in written):
        raise DomainError("a list of values holds numbers only")
    values = tuple(_finite(value) for value in written)
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise DomainError(f"{twice[0]:g} is listed twice, the same trial would run twice", "name each value once")
    return Choices(values)


def _range(written: Mapping[str, Any]) -> Domain:
    if len(written) != 1 or next(iter(written)) not in _RANGES:
        raise DomainError(f"a range is one of {', '.join(_RANGES)}")
    kind, ends = next(iter(written.items()))
    if not isinstance(ends, (list, tuple)) or len(ends) != 2 or not all(_is_number(end) for end in ends):
        raise DomainError(f"{kind} takes two numbers", f"write {{{kind}: [low, high]}}")
    low, high = (_finite(end) for end in ends)
    if low >= high:
        raise DomainError(f"the low end {low:g} must be below the high end {high:g}", "for one value write a number")
    if kind == "log" and low <= 0:
        raise DomainError(f"a log range must start above 0, not at {low:g}", "write {uniform: [low, high]} instead")
    if kind == "integer":
        if not (low.is_integer() and high.is_integer()):
            raise DomainError("an integer range has whole ends", "write {uniform: [low, high]} instead")
        return Integer(int(low), int(high))
    return _RANGES[kind](low, high)


def _size(domain: Domain) -> float:
    if isinstance(domain, Choices):
        return len(domain.values)
    return domain.high - domain.low + 1 if isinstance(domain, Integer) else math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise DomainError(f"{value:g} is not a finite number", "write the number, such as 5e-6")
    return float(value)
