"""What a person sees of the pairs: exactly the tokens that are trained on, drops, cuts and lengths.

`show_pairs` gives data, `render_pairs` gives rich renderables; printing is the caller's. Texts come from
strangers: control characters are shown, never sent to the terminal, and markup is not interpreted.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from prefopt_ray.pairs.config import PART_NAMES
from prefopt_ray.pairs.load import LoadedPairs, Truncation
from prefopt_ray.pairs.tokens import PairTokens

LAST_TOKENS = 4
_ROWS_SHOWN = 12  # per drop reason
_PROMPT_STYLE, _CHOSEN_STYLE, _REJECTED_STYLE = "dim", "green", "red"


@dataclass(frozen=True)
class PairView:
    """One pair, decoded from its token ids."""

    part: str
    row: int
    prompt: str
    chosen: str
    rejected: str
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    chosen_end: tuple[tuple[int, str], ...]  # (id, text) of the last tokens
    rejected_end: tuple[tuple[int, str], ...]
    chosen_score: float | None  # None: the spec names no score columns
    rejected_score: float | None


def show_pairs(
    loaded: LoadedPairs, tokenizer: PreTrainedTokenizerBase, n: int, *, part: str = "train"
) -> list[PairView]:
    """The first n pairs of a part."""
    tokens = loaded.data.parts[part]
    return [_view(part, tokens, index, tokenizer) for index in range(min(n, len(tokens)))]


def render_pairs(views: Sequence[PairView], loaded: LoadedPairs) -> RenderableType:
    """Pairs, then lengths and cuts per part, drops by reason with row numbers, warnings."""
    parts: list[RenderableType] = [_render_view(view) for view in views]
    parts.append(_length_table(loaded))
    if loaded.drops:
        parts.append(_drop_table(loaded))
    parts += [Text(f"warning: {visible(warning)}", style="yellow") for warning in loaded.warnings]
    return Group(*parts)


def visible(text: str) -> str:
    """Control and direction characters as escapes (`\\x1b`, `\\u202e`); line breaks and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNSAFE else _escape(c) for c in text)


_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Cf holds bidirectional overrides and zero-width characters


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _view(part: str, tokens: PairTokens, index: int, tokenizer: PreTrainedTokenizerBase) -> PairView:
    prompt, chosen, rejected = (r[index].tolist() for r in (tokens.prompt, tokens.chosen, tokens.rejected))
    scores = (None, None) if tokens.scores is None else tuple(tokens.scores[index].tolist())
    return PairView(
        part, int(tokens.row_ids[index]),
        _decode(tokenizer, prompt), _decode(tokenizer, chosen), _decode(tokenizer, rejected),
        len(prompt), len(chosen), len(rejected),
        tuple((token, _decode(tokenizer, [token])) for token in chosen[-LAST_TOKENS:]),
        tuple((token, _decode(tokenizer, [token])) for token in rejected[-LAST_TOKENS:]),
        *scores,
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _render_view(view: PairView) -> Text:
    text = Text()
    text.append(f"{view.part} row {view.row}", style="bold")
    text.append(f"  prompt {view.prompt_tokens} tokens, chosen {view.chosen_tokens}, rejected {view.rejected_tokens}\n")
    text.append(visible(view.prompt), style=_PROMPT_STYLE)
    for name, completion, end, score, style in (
        ("chosen", view.chosen, view.chosen_end, view.chosen_score, _CHOSEN_STYLE),
        ("rejected", view.rejected, view.rejected_end, view.rejected_score, _REJECTED_STYLE),
    ):
        text.append(f"\n[{name}{'' if score is None else f', score {score:g}'}] ", style="bold")
        text.append(visible(completion), style=style)
        text.append("\n   ends with  ", style="bold")
        text.append("  ".join(f"{token} {_quoted(piece)}" for token, piece in end))
    text.append("\n")
    return text


def _quoted(piece: str) -> str:
    return "'" + visible(piece).replace("\n", "\\n").replace("\t", "\\t") + "'"


def _length_table(loaded: LoadedPairs) -> Table:
    table = Table(title="pairs and tokens (prompt + longer completion)", title_justify="left")
    for name in ("part", "pairs", "median", "95 %", "longest", "prompts cut", "completions cut"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in PART_NAMES:
        longest = loaded.data.parts[part].longest
        quantiles = [f"{value:.0f}" for value in np.quantile(longest, (0.5, 0.95, 1.0))]
        table.add_row(part, str(len(longest)), *quantiles, *_cut_cells(loaded.truncation[part]))
    return table


def _cut_cells(cut: Truncation) -> tuple[str, str]:
    completions = 2 * cut.pairs
    return (f"{cut.prompts_cut} ({cut.prompts_cut / cut.pairs:.1%})",
            f"{cut.completions_cut} ({cut.completions_cut / completions:.1%})")


def _drop_table(loaded: LoadedPairs) -> Table:
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)
    for drop in loaded.drops:
        rows[drop.part, drop.reason].append(drop.row)
    table = Table(title="dropped rows (counted from 0)", title_justify="left")
    for name in ("part", "reason", "count", "rows"):
        table.add_column(name, justify="right" if name == "count" else "left")
    for (part, reason), numbers in rows.items():
        listed = ", ".join(map(str, numbers[:_ROWS_SHOWN])) + (", ..." if len(numbers) > _ROWS_SHOWN else "")
        table.add_row(part, Text(reason), str(len(numbers)), listed)
    return table
