"""Loss cards: what each loss is, needs, promises and how it is usually searched. Plain data, no torch.

Adding a loss is one card, one function in `formulas` and one line in the contract suite. `find_card` also
answers for compositions (`sigmoid:js`, `sigmoid+nll`) and for losses a person has registered.
"""

import difflib

from prefopt_ray.losses import registry
from prefopt_ray.losses.card import LossCard, Param, Range
from prefopt_ray.losses.cards_experimental import EXPERIMENTAL
from prefopt_ray.losses.cards_used import NLL, WIDELY_USED
from prefopt_ray.losses.compositions import ALIASES, DIVERGENCES, compose, is_composition

__all__ = [
    "CARDS", "LOSS_NAMES", "LossCard", "Param", "Range", "closest_loss", "every_card", "find_card", "find_part",
]  # fmt: skip

CARDS: dict[str, LossCard] = {card.name: card for card in (*WIDELY_USED, *EXPERIMENTAL)}  # widely used ones first
_ALIASES = {alias: card.name for card in CARDS.values() for alias in card.aliases}
LOSS_NAMES: tuple[str, ...] = tuple(CARDS)
registry.reserve(*CARDS, *_ALIASES, *ALIASES, NLL.name)


def find_card(name: str) -> LossCard:
    """The card of a full name, alias or composition; KeyError otherwise.

    `ipo` -> `ipo_mean`, `sigmoid:js` (an f-divergence), `sigmoid+nll` (a weighted mixture), `rpo` -> `sigmoid+nll`.
    Raises LossPluginError when the name is not built in and an installed entry point is broken.
    """
    full = ALIASES.get(name, name)
    return compose(full, find_part) if is_composition(full) else _plain_card(full)


def find_part(name: str) -> LossCard:
    """The card of a plain name, an alias, or `nll`, which only a mixture may hold; KeyError otherwise."""
    return NLL if name == NLL.name else _plain_card(name)


def every_card() -> dict[str, LossCard]:
    """All built-in cards, the widely used first, then those a person registered or installed."""
    registry.load_entry_points()
    return CARDS | {card.name: card for card, _ in registry.registered_losses()}


def closest_loss(name: str) -> str | None:
    """For "did you mean": each part of a composition by itself, and its divergence."""
    known = [*LOSS_NAMES, *_ALIASES, *ALIASES, *(card.name for card, _ in registry.registered_losses())]
    parts = name.split("+")
    if len(parts) > 1:
        known.append(NLL.name)
    closest = [_closest_part(part, known) for part in parts]
    return "+".join(closest) if all(closest) else None


def _plain_card(name: str) -> LossCard:
    full = _ALIASES.get(name, name)
    return CARDS[full] if full in CARDS else registry.find_registered(full)[0]


def _closest_part(part: str, known: list[str]) -> str | None:
    name, colon, divergence = part.partition(":")
    loss = difflib.get_close_matches(name, known, n=1)
    if not loss or not colon:
        return loss[0] if loss else None
    link = difflib.get_close_matches(divergence, DIVERGENCES, n=1)
    return f"{loss[0]}:{link[0]}" if link else loss[0]
