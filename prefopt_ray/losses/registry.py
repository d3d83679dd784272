"""Losses that are not built in: registered by a person, or found in an installed package. No torch.

    register_loss(replace(find_card("sigmoid"), name="mine"), my_formula)     # in a notebook
    [project.entry-points."prefopt_ray.losses"] mine = "my_package:my_loss"    # in a package

An entry point is (card, formula), a list of such pairs, or a callable returning either. Knows no formula.
"""

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from prefopt_ray.errors import PrefoptError
from prefopt_ray.losses.card import LossCard
from prefopt_ray.losses.card_checks import card_problems

GROUP = "prefopt_ray.losses"

RegisteredLoss = tuple[LossCard, Callable]  # the formula is a `stats.LossFunction`

_registered: dict[str, RegisteredLoss] = {}
_reserved: set[str] = set()
_loaded: set[tuple[str, str]] = set()  # entry points read, (name, value)


class LossPluginError(PrefoptError):
    """An installed package offers a loss that cannot be used."""


def register_loss(card: LossCard, formula: Callable) -> None:
    """Make a loss known by its name, in this process; a spec may then search it, alone or in a mixture.

    `formula(stats, params, state)` returns (loss (B,), state) and must work with `state=None`. A registered loss of
    the same name is replaced: a notebook's cell runs more than once.
    Raises ValueError for a name that is built in, and for a card that breaks a rule of `card_checks`.
    """
    if not isinstance(card, LossCard):
        raise ValueError(f"a loss is registered with its LossCard, got {card!r}")
    if broken := card_problems(card):
        raise ValueError(f"the card of {card.name!r} cannot be used: {'; '.join(broken)}")
    if not callable(formula):
        raise ValueError(f"the formula of {card.name} must be a function, got {formula!r}")
    for name in (card.name, *card.aliases):
        if name in _reserved:
            raise ValueError(f"there is a loss {name} already; choose another name")
    if card.aliases:
        raise ValueError(f"{card.name}: a registered loss has no aliases, got {', '.join(card.aliases)}")
    _registered[card.name] = (card, formula)


def unregister_loss(name: str) -> None:
    """Forget a registered loss. Raises KeyError for one that is not registered."""
    del _registered[name]


def registered_losses() -> tuple[RegisteredLoss, ...]:
    """What was registered so far, in order: to register the same in another process."""
    return tuple(_registered.values())


def find_registered(name: str) -> RegisteredLoss:
    """A registered loss; installed packages are read before giving up with KeyError.

    Raises LossPluginError for an entry point that cannot be loaded or does not give losses.
    """
    if name not in _registered:
        load_entry_points()
    return _registered[name]


def load_entry_points() -> None:
    """Register what installed packages offer; each entry point is read once. Raises LossPluginError."""
    for point in entry_points(group=GROUP):
        if (point.name, point.value) not in _loaded:
            _register_offered(point)
            _loaded.add((point.name, point.value))


def reserve(*names: str) -> None:
    """Names that a registered loss may not take."""
    _reserved.update(names)


def _register_offered(point: EntryPoint) -> None:
    place = f"entry point {point.name} = {point.value} of group {GROUP}"
    try:
        offered = point.load()
        offered = offered() if callable(offered) else offered
        for card, formula in offered if isinstance(offered, list) else [offered]:
            if isinstance(card, LossCard) and card.name in _registered:
                raise ValueError(f"there is a loss {card.name} already")
            register_loss(card, formula)
    except Exception as error:  # whatever somebody else's package raises, or gives instead of losses
        raise LossPluginError(f"{place}: {type(error).__name__}: {error}") from error
