"""The prompts of held-out pairs as people and chat models read them, from the rows that the token ids came from.

Token ids decode to a template's marks or, without its special tokens, to words run together; the rows do not.
"""

import numpy as np

from prefopt_ray.judges.base import Prompt
from prefopt_ray.pairs.config import PairsConfig
from prefopt_ray.pairs.rows import open_source
from prefopt_ray.pairs.shapes import Message, Pair, dialogue_turns, find_columns, read_pair


def read_prompts(config: PairsConfig, part: str, row_ids: np.ndarray) -> tuple[Prompt, ...]:
    """The prompts of these rows of a part, in their order. Reads the source again; raises DataError."""
    source = config.source_of(part)
    opened = open_source(source)
    rows = opened.read()
    columns = find_columns(rows, dict(source.columns), opened.name)
    by_number = {row.number: row for row in rows}
    return tuple(prompt_of(read_pair(by_number[int(row)], columns), plain=config.text == "plain") for row in row_ids)


def prompt_of(pair: Pair, *, plain: bool) -> Prompt:
    """Plain text stays text; everything else is a conversation, shown as a transcript when it has several turns."""
    if isinstance(pair.prompt, str):
        return Prompt(pair.prompt, () if plain else tuple(dialogue_turns(pair.prompt)))
    return Prompt(_transcript(pair.prompt), tuple(pair.prompt))


def _transcript(turns: tuple[Message, ...]) -> str:
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)
