"""Losses made of others by name: `<loss>:<divergence>` and `<loss>+<loss>[+...]`. Cards only, no torch.

A divergence replaces the log-ratio D by f'(e^D) (f-DPO, arXiv:2309.16240), with the constants TRL keeps.
A mixture is a weighted sum; its parts share beta, as in TRL. `links` and `formulas` compute both. The order of
its parts decides whose reward, learning rate and defaults it takes, never its weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from prefopt_ray.losses.card import LossCard, Param, Range
from prefopt_ray.losses.card_parts import EXPONENT_LIMIT

ALIASES = {"rpo": "sigmoid+nll", "mpo": "sigmoid+bco+nll"}
_RPO, _MPO = frozenset({"sigmoid", "nll"}), frozenset({"sigmoid", "bco", "nll"})
_WEIGHTS = {_MPO: {"sigmoid": 0.8, "bco": 0.2, "nll": 1.0}}  # arXiv:2411.10442; in every other mixture parts weigh 1
_SOURCES = {
    _RPO: "Pang et al. 2024, arXiv:2404.19733 (alpha = nll_weight = 1, NLL averaged over tokens)",
    _MPO: "Wang et al. 2024, arXiv:2411.10442 (w_p .8, w_q .2, w_g 1)",
}
_SHARED = frozenset({"beta", "label_smoothing", "divergence_alpha"})  # mean the same in every part

# Where TRL allows them: losses that see only log-ratios to the reference, as a difference of the two sides.
LINKABLE = ("sigmoid", "sigmoid_norm", "cdpo", "ipo_mean", "ipo_sum", "hinge", "robust", "exo", "discopop")
_CLAMP = f"the exponent is held at {EXPONENT_LIMIT:g} at most, beyond it a completion is not pulled any more"
DIVERGENCES: dict[str, tuple[str, str]] = {  # name -> what D becomes, clamp
    "forward_kl": ("1 - e^-D", _CLAMP),
    "js": ("log 2 + log sigma(D)", ""),
    "alpha": ("(e^((divergence_alpha - 1) D) - 1) / (divergence_alpha - 1)", _CLAMP),
}
_DIVERGENCE_ALPHA = Param(
    "divergence_alpha", 0.5, Range(0.1, 0.9, log=False),
    "order of the alpha-divergence: 1 is the usual reverse KL, 0 the forward KL",
    lower=0.0, upper=2.0, lower_inclusive=True, upper_inclusive=True, searched=False,
)  # fmt: skip


def is_composition(name: str) -> bool:
    return ":" in name or "+" in name


def compose(name: str, find: Callable[[str], LossCard]) -> LossCard:
    """The card of a composition, its parts looked up by `find`. Raises KeyError, saying why, for an undefined one."""
    cards = [_linked(part, find) for part in name.split("+")]
    return _mixture(cards) if len(cards) > 1 else cards[0]


def weight_name(part: str) -> str:
    """The parameter that weighs a part: `nll_weight`; for `sigmoid:js` it is `sigmoid_weight`."""
    return f"{part.partition(':')[0]}_weight"


def _linked(part: str, find: Callable[[str], LossCard]) -> LossCard:
    name, colon, divergence = part.partition(":")
    card = find(name)
    if not colon:
        return card
    if card.name not in LINKABLE or divergence not in DIVERGENCES:
        raise KeyError(f"{part}: a divergence is one of {', '.join(DIVERGENCES)}, for one of {', '.join(LINKABLE)}")
    link, clamp = DIVERGENCES[divergence]
    return replace(
        card,
        name=f"{card.name}:{divergence}",
        title=f"{card.title}, {divergence} divergence",
        formula=f"{card.formula}, where D becomes {link}",
        source=f"{card.source}; Wang et al. 2023, arXiv:2309.16240",
        params=(*card.params, _DIVERGENCE_ALPHA) if divergence == "alpha" else card.params,
        bradley_terry=False,  # of f'(e^D), not of the log-ratio that is its reward here
        experimental=True,
        aliases=(),
        clamp=clamp,
        trl=card.trl if card.trl.startswith("none") else _TRL_DIVERGENCE[divergence],
        note="The reward stays the log-ratio: f' is increasing, so summed log-ratios order pairs as it does.",
    )


_TRL_DIVERGENCE = {
    "forward_kl": "f_divergence_type=forward_kl; no clamp there, its exponential overflows",
    "js": "f_divergence_type=js_divergence",
    "alpha": "f_divergence_type=alpha_divergence; its exponent is held at 80 in float32",
}


def _mixture(cards: list[LossCard]) -> LossCard:
    name = "+".join(card.name for card in cards)
    if len({weight_name(card.name) for card in cards}) < len(cards):
        raise KeyError(f"{name}: a mixture holds each loss once")
    rewarded = [card for card in cards if card.reward]
    if not rewarded:
        raise KeyError(f"{name}: a mixture needs a part that prefers")
    parts = frozenset(card.name for card in cards)
    weights = _WEIGHTS.get(parts, dict.fromkeys(parts, 1.0))
    terms = [f"{weight_name(card.name)} x [{card.formula}]" for card in cards]
    lead = rewarded[0]
    return replace(
        lead,
        name=name,
        title=" + ".join(card.title for card in cards),
        formula=" + ".join(terms),
        source=_SOURCES.get(parts, "; ".join(card.source for card in cards)),
        params=(*_shared_params(name, cards), *(_weight(card, weights[card.name]) for card in cards)),
        beta_unit=next((card.beta_unit for card in cards if "beta" in card.param_names), lead.beta_unit),
        needs=frozenset().union(*(card.needs for card in cards)),
        loss_at_start=_weighted_start(cards),
        bradley_terry=False,
        bounded_below=all(card.bounded_below for card in cards),
        start_is_scale=all(card.start_is_scale for card in cards),
        scope="batch" if any(card.scope == "batch" for card in cards) else "pair",
        stateful=any(card.stateful for card in cards),
        experimental=any(card.experimental for card in cards),
        aliases=tuple(alias for alias, full in ALIASES.items() if full == name),
        clamp="; ".join(f"{card.name}: {card.clamp}" for card in cards if card.clamp),
        trl="; ".join(f"{card.name}: {card.trl}" for card in cards if card.trl),
        note=f"Reward and learning rate are those of {lead.name}; {_shared_beta(cards)}",
    )


def _shared_beta(cards: list[LossCard]) -> str:
    """Whose beta it is, and a warning where the parts count it in different units."""
    units = {card.name: card.beta_unit for card in cards if "beta" in card.param_names}
    if len(set(units.values())) < 2:
        return "beta is shared by all parts that read it."
    each = "; ".join(f"{name}: {unit}" for name, unit in units.items())
    return f"beta is shared by {' and '.join(units)} though its unit differs: {each}."


def _weight(card: LossCard, default: float) -> Param:
    return Param(
        weight_name(card.name), default, Range(0.005, 2.0), f"weight of {card.name} in the sum", searched=False
    )


def _shared_params(name: str, cards: list[LossCard]) -> tuple[Param, ...]:
    """The parts' own parameters, shared ones once. Raises KeyError when one name would mean two things."""
    found: dict[str, list[Param]] = {}
    for param in (param for card in cards for param in card.params):
        found.setdefault(param.name, []).append(param)
    for param_name, same in found.items():
        if len(same) > 1 and param_name not in _SHARED:
            raise KeyError(f"{name}: two parts read {param_name}, and mean different things by it")
    return tuple(_within_all_bounds(name, same) for same in found.values())


def _within_all_bounds(name: str, same: list[Param]) -> Param:
    """The first of them that keeps every part's bounds, with the tightest ones. Raises KeyError if none does."""
    for param in same:
        if all(other.allows(value) for other in same for value in (param.default, param.usual.low, param.usual.high)):
            low, high = max(p.lower for p in same), min(p.upper for p in same)
            return replace(
                param, lower=low, upper=high,
                lower_inclusive=all(p.lower_inclusive for p in same if p.lower == low),
                upper_inclusive=all(p.upper_inclusive for p in same if p.upper == high),
            )  # fmt: skip
    rules = "; ".join(p.rule for p in same)
    raise KeyError(f"{name}: no part's usual {same[0].name} keeps the bounds of all parts ({rules})")


def _weighted_start(cards: list[LossCard]) -> Callable[[Mapping[str, float]], float] | None:
    if any(card.loss_at_start is None for card in cards):
        return None
    return lambda params: sum(params[weight_name(card.name)] * card.loss_at_start(params) for card in cards)
