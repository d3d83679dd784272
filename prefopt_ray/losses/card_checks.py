"""What a card must keep, told when a loss is registered instead of in the middle of its sweep. No torch, no formula."""

import math
import re
from collections.abc import Iterator

from prefopt_ray.losses.card import LossCard, Param, Range

NEEDS = ("reference", "lengths", "per_token", "token_sq", "distribution", "mismatched", "scores")
REWARDS = ("sum", "per_token", "policy_sum", "policy_per_token", "log_odds")
SCOPES = ("pair", "batch")
_WORD = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("loss", "learning_rate")  # keys beside a loss's parameters in specs and records


def card_problems(card: LossCard) -> list[str]:
    """Every broken rule, in words; empty for a card that can be searched."""
    return [*_words(card), *_parameters(card), *_rates(card), *_start(card)]


def _words(card: LossCard) -> Iterator[str]:
    if not _WORD.fullmatch(card.name):
        yield f"the name {card.name!r} must be lower-case letters, digits and underscores, starting with a letter"
    if unknown := sorted(set(card.needs) - set(NEEDS)):
        yield f"needs {', '.join(map(repr, unknown))}; what can be needed is {', '.join(NEEDS)}"
    if card.reward not in REWARDS:
        yield f"reward {card.reward!r} must be one of {', '.join(REWARDS)}"
    if card.scope not in SCOPES:
        yield f"scope {card.scope!r} must be one of {', '.join(SCOPES)}"


def _parameters(card: LossCard) -> Iterator[str]:
    names = card.param_names
    if len(set(names)) < len(names):
        yield f"a parameter is listed twice: {', '.join(names)}"
    for param in card.params:
        if not _WORD.fullmatch(param.name) or param.name in _TAKEN:
            rule = f"lower-case letters, digits and underscores, not {' or '.join(_TAKEN)}"
            yield f"{param.name!r} cannot be a parameter: {rule}"
        if not param.allows(param.default):
            yield f"the default {param.default:g} of {param.name} breaks its own rule: {param.rule}"
        yield from _range(f"the usual range of {param.name}", param.usual)
        yield from _inside(param)


def _inside(param: Param) -> Iterator[str]:
    outside = [value for value in (param.usual.low, param.usual.high) if not param.allows(value)]
    if outside:
        yield f"the usual range of {param.name} holds {outside[0]:g}, which breaks its own rule: {param.rule}"


def _rates(card: LossCard) -> Iterator[str]:
    for name in ("learning_rate_lora", "learning_rate_full"):
        rates: Range = getattr(card, name)
        yield from _range(name, rates)
        if not rates.low > 0:
            yield f"{name} must be above 0, got {rates.low:g}"


def _range(what: str, usual: Range) -> Iterator[str]:
    if not (math.isfinite(usual.low) and math.isfinite(usual.high) and usual.low < usual.high):
        yield f"{what} must go from a low to a higher number, got {usual.low:g} to {usual.high:g}"
    elif usual.log and usual.low <= 0:
        yield f"{what} starts at {usual.low:g}, which has no logarithm: write Range({usual.low:g}, ..., log=False)"


def _start(card: LossCard) -> Iterator[str]:
    if card.loss_at_start is None:
        return
    try:
        value = float(card.loss_at_start(card.defaults))
    except Exception as error:  # a person's function may raise anything
        yield f"loss_at_start fails at the default parameters: {type(error).__name__}: {error}"
        return
    if not math.isfinite(value):
        yield f"loss_at_start is {value:g} at the default parameters; None says that it is measured"
