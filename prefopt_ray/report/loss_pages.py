"""What `prefopt losses` shows: every loss in a line, one loss on a page, or the same as plain data for JSON.

Made from the cards alone, so it cannot say anything else than what a sweep does. Prints nothing, knows no maths.
"""

import textwrap
from collections.abc import Iterator
from typing import Any

from prefopt_ray.losses.cards import LossCard, Param, Range, every_card, find_card
from prefopt_ray.losses.compositions import ALIASES, DIVERGENCES, LINKABLE

# What stands in a formula, and in `needs`.
_NOTATION = (
    "D = log pi - log pi_ref of a completion, summed over its tokens, in nats; Dc and Dr are those of the chosen and "
    "the rejected one; h = Dc - Dr, u = beta h, |y| = number of tokens"
)
_NEEDS = {
    "reference": "log-probs under the reference",
    "lengths": "token counts of the completions",
    "per_token": "log-probs summed over the first min(|yc|, |yr|) tokens, too",
    "token_sq": "the policy's whole distribution at each token (more memory)",
    "distribution": "policy's and reference's whole distributions at each token (more memory, one more pass)",
    "mismatched": "log-probs of another row's completion (one more pass)",
    "scores": "a score of both answers: data.columns: {chosen_score: NAME, rejected_score: NAME}",
}
_REWARDS = {
    "sum": "D, nats",
    "per_token": "D / |y|, nats per token",
    "policy_sum": "log-prob under the policy, nats; no reference",
    "policy_per_token": "log-prob under the policy / |y|, nats per token; no reference",
    "log_odds": "log-odds of the mean token probability under the policy; no reference",
}
_SCOPES = {
    "pair": "each pair by itself",
    "batch": "the whole optimizer batch at once; where it takes several forward passes it is run twice",
}
_WIDTH, _COLUMN = 100, 14  # of the page, and of its left column


def loss_list() -> str:
    """All losses, one line each, the widely used first. Raises LossPluginError for a broken entry point."""
    cards = every_card().values()
    rows = [("name", "beta, usual", "its unit", "needs", "what it is"), *map(_list_row, cards)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    head, *lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)
    used = [line for card, line in zip(cards, lines) if not card.experimental]
    experimental = [line for card, line in zip(cards, lines) if card.experimental]
    return "\n".join((head, *used, "", "experimental", *experimental, "", *_composed()))


def loss_page(name: str) -> str:
    """All that is known about one loss, as text. Raises KeyError for an unknown name."""
    card = find_card(name)
    return "\n".join((*_head(card), "", *_numbers(card), "", *_computing(card), "", *_attempt(card)))


def loss_facts(card: LossCard) -> dict[str, Any]:
    """The card as plain values for JSON; the loss at the start is that at the default parameters."""
    return {
        "name": card.name,
        "title": card.title,
        "aliases": list(card.aliases),
        "experimental": card.experimental,
        "formula": card.formula,
        "source": card.source,
        "parameters": [
            {"name": p.name, "default": p.default, "usual": _range_facts(p.usual), "searched": p.searched,
             "rule": p.rule, "meaning": p.meaning}
            for p in card.params
        ],
        "learning_rate": {"lora": _range_facts(card.learning_rate_lora), "full": _range_facts(card.learning_rate_full)},
        "beta_unit": card.beta_unit,
        "needs": sorted(card.needs),
        "scope": card.scope,
        "stateful": card.stateful,
        "reward": card.reward,
        "bounded_below": card.bounded_below,
        "loss_at_start": None if card.loss_at_start is None else card.loss_at_start(card.defaults),
        "clamp": card.clamp,
        "trl": card.trl,
        "note": card.note,
    }


def loss_list_facts() -> list[dict[str, Any]]:
    """Every card, in the order of the list."""
    return [loss_facts(card) for card in every_card().values()]


# --- the list --------------------------------------------------------------------------------------


def _list_row(card: LossCard) -> tuple[str, ...]:
    has_beta = "beta" in card.param_names
    return (
        ", ".join((card.name, *card.aliases)),
        _usual(card.param("beta").usual) if has_beta else "-",
        card.beta_unit if has_beta else "-",
        ", ".join(sorted(card.needs)) or "-",
        card.title,
    )


def _composed() -> Iterator[str]:
    known = ", ".join(f"{alias} = {full}" for alias, full in ALIASES.items())
    yield f"LOSS:DIVERGENCE puts another f-divergence into {', '.join(LINKABLE)}: {', '.join(DIVERGENCES)}; sigmoid:js"
    yield f"LOSS+LOSS is a weighted sum, also with nll, the chosen answer's own likelihood: sigmoid+nll; {known}"
    yield "`prefopt losses NAME` explains one, also one of these"


# --- the page --------------------------------------------------------------------------------------


def _head(card: LossCard) -> Iterator[str]:
    yield f"{card.name}: {card.title}{' (experimental)' if card.experimental else ''}"
    if card.aliases:
        yield f"also called {', '.join(card.aliases)}"
    yield ""
    yield from _row("loss", card.formula)
    yield from _row("", _NOTATION)
    if card.clamp:
        yield from _row("clamp", card.clamp)
    yield from _row("source", card.source)
    if card.note:
        yield from _row("note", card.note)
    if card.trl:
        yield from _row("TRL 1.16", card.trl)


def _numbers(card: LossCard) -> Iterator[str]:
    yield "parameters"
    width = max((len(p.name) for p in card.params), default=0) + 2
    for param in card.params:
        yield f"  {param.name:<{width}}{param.meaning}"
        yield f"  {'':<{width}}default {param.default:g}, {_how_searched(param)}; {param.rule}"
    if "beta" in card.param_names:
        yield f"  unit of beta: {card.beta_unit}"
    yield "learning rate, usual"
    yield f"  LoRA {_usual(card.learning_rate_lora)}, full fine-tuning {_usual(card.learning_rate_full)}"


def _computing(card: LossCard) -> Iterator[str]:
    needs = [_NEEDS[need] for need in _NEEDS if need in card.needs]
    yield from _row("needs", "; ".join(needs) or "the policy's log-probs alone")
    memory = "; remembers numbers from step to step" if card.stateful else ""
    yield from _row("looks at", _SCOPES[card.scope] + memory)
    yield from _row("reward", f"{_REWARDS[card.reward]} (what gain and accuracy are measured on)")
    yield from _row("at step 0", _start(card))
    if not card.bounded_below:
        yield from _row("beware", "the loss is not bounded below")


def _attempt(card: LossCard) -> Iterator[str]:
    """Both ways work as they are: the first without a download, the second inside any spec."""
    choices = ", ".join(f"{param.name}: {_three(param)}" for param in card.params[:1])
    yield "try it"
    yield f"  prefopt run sweeps/quickstart.yaml --set 'search.losses={{{card.name}: {{{choices}}}}}'"
    yield "or in a spec of your own"
    if "scores" in card.needs:
        yield "  data:"
        yield "    columns: {chosen_score: score_chosen, rejected_score: score_rejected}"
    yield "  search:"
    yield "    method: random"
    yield "    trials_per_loss: 8"
    yield "    losses:"
    searched = [f"{p.name} {_usual(p.usual)}" for p in card.params if p.searched]
    yield f"      {card.name}: {{}}    # searches {', '.join((*searched, 'learning_rate'))}"


def _row(name: str, text: str) -> Iterator[str]:
    indent = " " * _COLUMN
    yield from textwrap.wrap(
        text, _WIDTH, initial_indent=f"{name:<{_COLUMN}}", subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )


def _how_searched(param: Param) -> str:
    return f"usual {_usual(param.usual)}" + ("" if param.searched else " (searched only when a spec names it)")


def _usual(usual: Range) -> str:
    return f"{usual.low:g} to {usual.high:g}"


def _start(card: LossCard) -> str:
    if card.loss_at_start is None:
        return "measured: it is not the same for every policy and every data set"
    values = ", ".join(f"{name} {value:g}" for name, value in card.defaults.items())
    return f"{card.loss_at_start(card.defaults):.4g} where the policy is the reference, at {values}"


def _three(param: Param) -> str:
    """Both ends and the default: a choice of values works in a grid and outside."""
    values = sorted({param.usual.low, param.default, param.usual.high})
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _range_facts(usual: Range) -> dict[str, Any]:
    return {"low": usual.low, "high": usual.high, "log": usual.log}
