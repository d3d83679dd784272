"""From a raw row to one preference pair: explicit prompt, implicit prompt, hh dialogues, ShareGPT.

Knows column names, roles and dialogue marks; knows no files and no tokens.

Columns by rule: `chosen` and `rejected` (also `chosen_response`, `response_chosen` and the like), the prompt
in the first of `prompt`, `instruction` (an `input` column is appended to it), `question`, `query`, `input`,
`conversations`, `conversation`, `messages` that exists, else inside chosen and rejected; a `system` column is
put in front when the conversation has no system turn. Scores (`chosen_score`, `rejected_score`) are read only
where they are named: a sweep that does not use them must not fail on one that is missing. All other columns
are ignored.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.pairs.rows import Row, kind_of

CHOSEN_NAMES = ("chosen", "chosen_response", "response_chosen", "chosen_answer", "preferred")
REJECTED_NAMES = ("rejected", "rejected_response", "response_rejected", "rejected_answer", "dispreferred")
PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input", "conversations", "conversation", "messages")
SCORE_KEYS = ("chosen_score", "rejected_score")
COLUMN_KEYS = ("prompt", "chosen", "rejected", "system", *SCORE_KEYS)
ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "system": "system",
}
ASSISTANT_MARK = "\n\nAssistant:"
_LARGEST_FLOAT32 = 3.4028234e38
_NUMBER = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*", re.ASCII)
_TURN_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class DropReason(StrEnum):
    """Why a row makes no pair of its part."""

    EMPTY = "empty prompt or completion"
    IDENTICAL = "identical completions"
    IDENTICAL_AFTER_CUT = "identical after the cut"
    DIFFERING_PROMPTS = "differing prompts"
    MALFORMED = "malformed row"
    END_INSIDE = "end-of-turn token inside a completion"
    ALSO_IN_SELECT = "prompt also in select"
    ALSO_IN_TEST = "prompt also in test"


class RowDropped(Exception):
    """This row makes no pair; a malformed row says why in `problem`."""

    def __init__(self, reason: DropReason, problem: Problem | None = None) -> None:
        super().__init__(reason, problem)
        self.reason = reason
        self.problem = problem


@dataclass(frozen=True)
class Message:
    """One turn: role is user, assistant or system."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers of the assistant. A text prompt is used as it is, messages through a text form."""

    number: int
    place: str
    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str
    scores: tuple[float, float] | None = None  # chosen, rejected; finite in float32

    @cached_property
    def group(self) -> str:
        """The first human turn with whitespace normalised: pairs that share it never sit in two parts."""
        messages = dialogue_turns(self.prompt) if isinstance(self.prompt, str) else self.prompt
        first = next((m.content for m in messages if m.role == "user"), "")
        return " ".join(first.split())


@dataclass(frozen=True)
class Columns:
    """Which column holds what; `prompt=None` means inside chosen and rejected."""

    prompt: str | None
    chosen: str
    rejected: str
    system: str | None = None
    prompt_input: str | None = None  # the `input` beside an `instruction`
    scores: tuple[str, str] | None = None  # chosen's, rejected's


def find_columns(rows: Sequence[Row], overrides: Mapping[str, str], source: str) -> Columns:
    """The columns of this table by the rule above. Raises DataError naming the columns found."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    problems = [_unknown_key(key, source) for key in overrides if key not in COLUMN_KEYS]
    problems += [_missing_column(key, name, names, source)
                 for key, name in overrides.items() if key in COLUMN_KEYS and name not in names]
    found = {
        "prompt": overrides.get("prompt") or _first_of(PROMPT_NAMES, names),
        "chosen": overrides.get("chosen") or _first_of(CHOSEN_NAMES, names),
        "rejected": overrides.get("rejected") or _first_of(REJECTED_NAMES, names),
        "system": overrides.get("system") or _first_of(("system",), names),
    }
    problems += [_missing_column(key, None, names, source) for key in ("chosen", "rejected") if not found[key]]
    problems += _half_of_the_scores(overrides, names, source)
    if problems:
        raise DataError(*problems)
    chosen, rejected, prompt = str(found["chosen"]), str(found["rejected"]), found["prompt"]
    if prompt == chosen:  # `columns: {prompt: chosen}` = ignore the prompt column, the conversations hold it
        prompt = None
    with_input = prompt == "instruction" and "input" in names
    scores = (overrides["chosen_score"], overrides["rejected_score"]) if "chosen_score" in overrides else None
    return Columns(prompt, chosen, rejected, found["system"], "input" if with_input else None, scores)


def read_pair(row: Row, columns: Columns) -> Pair:
    """Raises RowDropped: malformed, empty, identical, or differing prompts."""
    chosen, rejected = (_read_text_or_messages(row, column) for column in (columns.chosen, columns.rejected))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise malformed(row.place, columns.rejected, kind_of(row.values[columns.rejected]),
                        f"{columns.chosen} and {columns.rejected} must have the same form")
    prompt = _read_prompt(row, columns)
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, answers = _pair_of_texts(row, columns, prompt, (chosen, rejected))
    else:
        prompt, answers = _pair_of_messages(row, columns, prompt, (tuple(chosen), tuple(rejected)))  # type: ignore[arg-type]
    prompt = _with_system(row, columns, prompt)
    _check_prompt(row, columns, prompt)
    if not all(answer.strip() for answer in answers):
        raise RowDropped(DropReason.EMPTY)
    if answers[0] == answers[1]:
        raise RowDropped(DropReason.IDENTICAL)
    scores = tuple(_read_score(row, column) for column in columns.scores) if columns.scores else None
    return Pair(row.number, row.place, prompt, *answers, scores)


def dialogue_turns(text: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf dialogue ("\\n\\nHuman: ...\\n\\nAssistant: ..."); any other text is one user turn.

    An open last "Assistant:" is not a turn. Text before the first mark is a system turn.
    """
    if not is_dialogue(text):
        return (Message("user", text),)
    before, *marked = _TURN_MARK.split(text)
    turns = [Message("system", before.strip())] if before.strip() else []
    for role, content in zip(marked[::2], marked[1::2]):
        turns.append(Message("user" if role == "Human" else "assistant", content.strip()))
    return tuple(turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns)


def is_dialogue(prompt: str) -> bool:
    """An hh-rlhf prompt: has a human turn and ends where the assistant speaks."""
    first = _TURN_MARK.search(prompt)
    return first is not None and first.group(1) == "Human" and prompt.rstrip().endswith(ASSISTANT_MARK)


def malformed(place: str, key: str, found: str, rule: str, fix: str = "") -> RowDropped:
    return RowDropped(DropReason.MALFORMED, Problem(place, key, found, rule, fix))


# --- columns ---------------------------------------------------------------------------------------


def _first_of(candidates: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def _unknown_key(key: str, source: str) -> Problem:
    close = difflib.get_close_matches(key, COLUMN_KEYS, n=1)
    fix = f"did you mean {close[0]!r}?" if close else ""
    return Problem(source, f"columns.{key}", repr(key), f"must be one of {', '.join(COLUMN_KEYS)}", fix)


def _missing_column(key: str, wanted: str | None, names: Sequence[str], source: str) -> Problem:
    found = f"the columns {', '.join(map(ascii, names[:12])) or '(none)'}"
    close = difflib.get_close_matches(wanted or key, names, n=1)
    if wanted:
        fix = f"did you mean {close[0]!r}?" if close else f"name an existing column in `columns: {{{key}: ...}}`"
        return Problem(source, f"columns.{key}", found, f"there is no column {wanted!r}", fix)
    hint = close[0] if close else "NAME"
    hint = hint if hint == hint.strip() else ascii(hint)  # a header written with ", " has names with a space
    fix = f"say which one it is: `columns: {{{key}: {hint}}}`; the first line of a csv must name the columns"
    return Problem(source, key, found, f"no column holds the {key} answer", fix)


def _half_of_the_scores(overrides: Mapping[str, str], names: Sequence[str], source: str) -> list[Problem]:
    given = [key for key in SCORE_KEYS if key in overrides]
    if len(given) != 1:
        return []
    (missing,) = set(SCORE_KEYS) - set(given)
    found = f"the columns {', '.join(map(ascii, names[:12]))}"
    return [Problem(source, f"columns.{missing}", found, f"{given[0]} is named, so both answers need a score",
                    f"name the other one: `columns: {{{missing}: NAME}}`")]


# --- cells -----------------------------------------------------------------------------------------


def _cell(row: Row, column: str) -> Any:
    if column not in row.values:
        found = f"the columns {', '.join(map(ascii, list(row.values)[:12])) or '(none)'}"
        raise malformed(row.place, column, found, f"the row has no {column!r}")
    return row.values[column]


def _read_text_or_messages(row: Row, column: str) -> str | tuple[Message, ...]:
    value = _cell(row, column)
    if isinstance(value, str):
        return _checked_text(row, column, value)
    if isinstance(value, Mapping):
        return (_read_message(row, column, value),)
    if isinstance(value, list | tuple):
        return tuple(_read_message(row, f"{column}[{i}]", item) for i, item in enumerate(value))
    raise malformed(row.place, column, kind_of(value), "must be text, a message, or a list of messages",
                    'a message is {"role": "user", "content": "..."}')


def _read_message(row: Row, key: str, value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise malformed(row.place, key, kind_of(value), "must be a message",
                        '{"role": "user", "content": "..."} or {"from": "human", "value": "..."}')
    role_key, text_key = ("role", "content") if "role" in value else ("from", "value")
    if role_key not in value or text_key not in value:
        raise malformed(row.place, key, kind_of(value), "a message needs `role` and `content`, or `from` and `value`")
    role = value[role_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        close = difflib.get_close_matches(str(role), ROLES, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(ROLES)}"
        found = ascii(role) if isinstance(role, str) else kind_of(role)
        raise malformed(row.place, f"{key}.{role_key}", found, "the role is unknown", fix)
    return Message(ROLES[role.lower()], _read_content(row, f"{key}.{text_key}", value[text_key]))


def _read_content(row: Row, key: str, value: Any) -> str:
    if isinstance(value, str):
        return _checked_text(row, key, value)
    is_parts = isinstance(value, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value)
    if is_parts and value and all(isinstance(part.get("text"), str) for part in value):
        return _checked_text(row, key, "".join(part["text"] for part in value))
    raise malformed(row.place, key, kind_of(value), "the content of a message must be text")


def _checked_text(row: Row, key: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise malformed(row.place, key, f"U+{ord(text[error.start]):04X}", "half of a character pair is not text",
                        "the file was cut inside an escape such as \\ud83d; write both halves") from error
    return text


def _read_score(row: Row, column: str) -> float:
    """A number, or text that reads as one (a csv file has nothing else)."""
    value = _cell(row, column)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and _NUMBER.fullmatch(value)):
        raise malformed(row.place, column, kind_of(value), "a score must be a number")
    try:
        score = float(value)
    except OverflowError:  # an integer of hundreds of digits
        score = math.inf
    if not abs(score) <= _LARGEST_FLOAT32:
        raise malformed(row.place, column, kind_of(value), "a score must be finite, and at most 3.4e38 in size")
    return score


def _read_prompt(row: Row, columns: Columns) -> str | tuple[Message, ...] | None:
    if columns.prompt is None:
        return None
    prompt = _read_text_or_messages(row, columns.prompt)
    extra = row.values.get(columns.prompt_input) if columns.prompt_input else None
    if isinstance(prompt, str) and extra is not None:
        if not isinstance(extra, str):
            raise malformed(row.place, str(columns.prompt_input), kind_of(extra), "must be text")
        return f"{prompt}\n{_checked_text(row, 'input', extra)}" if extra.strip() else prompt
    return prompt


# --- from cells to a pair --------------------------------------------------------------------------


def _pair_of_texts(
    row: Row, columns: Columns, prompt: str | tuple[Message, ...] | None, answers: tuple[str, str]
) -> tuple[str | tuple[Message, ...], tuple[str, str]]:
    if prompt is None:
        cut = [_cut_dialogue(row, column, text) for column, text in zip((columns.chosen, columns.rejected), answers)]
        if cut[0][0] != cut[1][0]:
            raise RowDropped(DropReason.DIFFERING_PROMPTS)
        return cut[0][0], (cut[0][1], cut[1][1])
    if isinstance(prompt, str) and is_dialogue(prompt) and all(answer.startswith(prompt) for answer in answers):
        return prompt, (answers[0][len(prompt) :], answers[1][len(prompt) :])
    return prompt, answers


def _cut_dialogue(row: Row, column: str, text: str) -> tuple[str, str]:
    """Cut after the last "\\n\\nAssistant:". The common prefix of the two texts would be wrong in 19 % of the rows
    of hh-rlhf: answers that begin alike ("I", "I'm") lose their beginning to the prompt."""
    if not text.strip():
        raise RowDropped(DropReason.EMPTY)
    at = text.rfind(ASSISTANT_MARK)
    if at < 0 or not is_dialogue(text[: at + len(ASSISTANT_MARK)]):
        raise malformed(row.place, column, kind_of(text),
                        'without a prompt column the text must be a dialogue "\\n\\nHuman: ...\\n\\nAssistant: ..."',
                        "name the prompt: `columns: {prompt: NAME}`")
    prompt, answer = text[: at + len(ASSISTANT_MARK)], text[at + len(ASSISTANT_MARK) :]
    if "\n\nHuman:" in answer:
        raise malformed(row.place, column, kind_of(answer[answer.index("\n\nHuman:") :]),
                        "the last turn must be the assistant's")
    return prompt, answer


def _pair_of_messages(
    row: Row,
    columns: Columns,
    prompt: str | tuple[Message, ...] | None,
    conversations: tuple[tuple[Message, ...], tuple[Message, ...]],
) -> tuple[tuple[Message, ...], tuple[str, str]]:
    turns = dialogue_turns(prompt) if isinstance(prompt, str) else prompt
    split = [_split_last(row, column, messages, turns)
             for column, messages in zip((columns.chosen, columns.rejected), conversations)]
    if split[0][0] != split[1][0]:
        raise RowDropped(DropReason.DIFFERING_PROMPTS)
    return split[0][0], (split[0][1], split[1][1])


def _split_last(
    row: Row, column: str, messages: tuple[Message, ...], prompt: tuple[Message, ...] | None
) -> tuple[tuple[Message, ...], str]:
    """(prompt, answer): the answer is the last turn, everything before it is prompt."""
    if not messages:
        raise RowDropped(DropReason.EMPTY)
    *before, last = messages
    if last.role != "assistant":
        raise malformed(row.place, column, f"a last turn of role {last.role!r}",
                        "the last turn must be the assistant's",
                        "chosen and rejected end with the answer that was judged")
    if prompt is None:
        return tuple(before), last.content
    if any(message.role == "user" for message in before):  # the whole conversation, the prompt inside it
        if not _contains(before, prompt):
            raise RowDropped(DropReason.DIFFERING_PROMPTS)
        return tuple(before), last.content
    return (*prompt, *before), last.content


def _contains(messages: Sequence[Message], part: Sequence[Message]) -> bool:
    """`part` appears in one stretch, outer whitespace aside: many sets repeat one turn, or the first, as prompt."""
    stripped = [(m.role, m.content.strip()) for m in messages]
    wanted = [(m.role, m.content.strip()) for m in part]
    return any(stripped[i : i + len(wanted)] == wanted for i in range(len(stripped) - len(wanted) + 1))


def _with_system(row: Row, columns: Columns, prompt: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    text = row.values.get(columns.system) if columns.system else None
    if text is None:
        return prompt
    if not isinstance(text, str):
        raise malformed(row.place, str(columns.system), kind_of(text), "must be text")
    if not text.strip():
        return prompt
    messages = dialogue_turns(prompt) if isinstance(prompt, str) else prompt
    if messages and messages[0].role == "system":
        return prompt
    return (Message("system", _checked_text(row, str(columns.system), text)), *messages)


def _check_prompt(row: Row, columns: Columns, prompt: str | tuple[Message, ...]) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowDropped(DropReason.EMPTY)
        return
    # Without a human turn there is nothing to answer, and nothing to keep parts apart by.
    if not any(m.role == "user" and m.content.strip() for m in prompt):
        raise RowDropped(DropReason.EMPTY)
    if prompt[-1].role == "assistant":
        raise malformed(row.place, columns.prompt or columns.chosen, "a prompt that ends with the assistant's turn",
                        "the turn before the answers must not be the assistant's")
