"""From a pair to the three texts that are tokenised: through a chat template, or plain.

Knows templates and how turns end; knows no token ids beyond the end-of-turn token, no cut and no files.
The plain form of messages is "\\n\\nHuman: ...\\n\\nAssistant: ..." (a system turn is "\\n\\nSystem: ..."); text
prompts and hh dialogues stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Protocol

import jinja2
from transformers import PreTrainedTokenizerBase

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.pairs.shapes import Message, Pair, dialogue_turns, is_dialogue, malformed

_PROBE = "prefopt probe"  # stands for an answer when a template is asked what it writes around it
_PLAIN_ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}
# Llama 3.2's template writes today's date otherwise: token ids would change overnight. This is its own fallback.
_FIXED_DATE = "26 Jul 2024"
# A template is a program of a stranger's: it may also divide by zero, miss a key or never end.
_TEMPLATE_FAILS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError,
)


@dataclass(frozen=True)
class TurnEnd:
    """How a completion ends: `text` is written after the answer, the last token is `token` (None: no such token)."""

    text: str
    token: int | None
    appended: bool  # the token is added as an id, since no text stands for it


@dataclass(frozen=True)
class PairTexts:
    """`chosen` and `rejected` follow the prompt directly; they do not hold the turn's end."""

    prompt: str
    chosen: str
    rejected: str


class TextForm(Protocol):
    """How pairs become texts."""

    end: TurnEnd
    warnings: tuple[str, ...]

    def texts(self, pair: Pair) -> PairTexts:
        """Raises RowDropped when the template refuses the conversation."""
        ...


def open_text_form(text: str, tokenizer: PreTrainedTokenizerBase) -> TextForm:
    """`template`, `plain`, or the path of a jinja file. Raises DataError."""
    if text == "plain":
        return PlainForm(tokenizer)
    place = f"chat template of {tokenizer.name_or_path}".removesuffix(" of ") if text == "template" else text
    return TemplateForm(tokenizer, _read_template(text, tokenizer), place=place)


def template_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides the texts beside the pair, for content hashes; empty for `plain`."""
    return "" if text == "plain" else _read_template(text, tokenizer)


def _read_template(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if text == "template":
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            rule = "this tokenizer has no chat template"
            raise DataError(Problem(tokenizer.name_or_path, "data.text", "'template'", rule,
                                    "use `text: plain`, or the path of a FILE.jinja")) from error
    path = Path(text).expanduser()
    if not path.is_file():
        rule = "must be template, plain, or an existing FILE.jinja"
        fix = "a path is relative to the folder of the spec"
        raise DataError(Problem(text, "data.text", "nothing there", rule, fix))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = "the template cannot be read as UTF-8 text"
        raise DataError(Problem(str(path), "data.text", str(error), rule, "save it as UTF-8")) from error


class PlainForm:
    """Prompt text and completion text, one after the other; base models without a template run in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        eos = tokenizer.eos_token_id
        self.end = TurnEnd("", eos, appended=eos is not None)
        self.warnings: tuple[str, ...] = () if eos is not None else (_NO_END,)
        self._eos_text = tokenizer.eos_token or ""

    def texts(self, pair: Pair) -> PairTexts:
        answers = [_without_end(text, self._eos_text) for text in (pair.chosen, pair.rejected)]
        if isinstance(pair.prompt, str):
            return PairTexts(pair.prompt, *answers)
        turns = "".join(f"\n\n{_PLAIN_ROLES[m.role]}: {m.content}" for m in pair.prompt)
        return PairTexts(f"{turns}\n\nAssistant:", *(f" {answer}" for answer in answers))


class TemplateForm:
    """The prompt up to the template's generation prompt; a completion is what the template adds after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, *, place: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._place = place  # for messages
        self._suffix = self._probe_suffix()
        self.end = self._find_end()
        self._end_text = tokenizer.convert_ids_to_tokens(self.end.token) if self.end.token is not None else ""
        self._folds_system = not self._accepts_system()
        self.warnings: tuple[str, ...] = ()
        if self.end.token is None:
            self.warnings += (_NO_END,)
        elif self.end.appended:
            self.warnings += (
                f"the template writes no end-of-turn token; {self._end_text!r} is appended to completions",
            )
        if self._folds_system:
            self.warnings += ("the template refuses system turns; their text is put in front of the first human turn",)

    def texts(self, pair: Pair) -> PairTexts:
        messages = dialogue_turns(pair.prompt) if isinstance(pair.prompt, str) else pair.prompt
        answers = [pair.chosen, pair.rejected]
        if isinstance(pair.prompt, str) and is_dialogue(pair.prompt):
            answers = [answer.strip() for answer in answers]
        if self._folds_system:
            messages = _fold_system(messages)
        try:
            prompt = self._render(messages, opens_answer=True)
            return PairTexts(prompt, *(self._answer(messages, prompt, text) for text in answers))
        except _TEMPLATE_FAILS as error:
            raise malformed(pair.place, "", _roles(messages), f"the chat template refuses it: {error}",
                            "use `text: plain`, or a template that takes these turns") from error

    def _answer(self, messages: Sequence[Message], prompt: str, text: str) -> str:
        text = _without_end(text, self._end_text)
        full = self._render([*messages, Message("assistant", text)], opens_answer=False)
        if full.startswith(prompt) and full.endswith(self._suffix) and len(full) >= len(prompt) + len(self._suffix):
            return full[len(prompt) : len(full) - len(self._suffix)]
        # The generation prompt holds something the template does not write before a given answer ("<think>\n"),
        # or it rewrites earlier turns: the prompt stays what the model sees when it generates, the answer is the
        # row's own text, without an opening that the prompt already holds.
        opening = prompt[len(commonprefix([prompt, full])) :]
        return text.removeprefix(opening) if opening else text

    def _render(self, messages: Sequence[Message], *, opens_answer: bool) -> str:
        rendered = self._tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=self._template, add_generation_prompt=opens_answer, tokenize=False, date_string=_FIXED_DATE,
        )
        assert isinstance(rendered, str)
        return rendered

    def _probe_suffix(self) -> str:
        """What the template writes after an answer. Raises DataError for a template that does not work at all."""
        probe = [Message("user", "question"), Message("assistant", _PROBE)]
        try:
            full = self._render(probe, opens_answer=False)
            self._render(probe[:1], opens_answer=True)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(Problem(f"{self._place}:{error.lineno}", "data.text", "", f"is not jinja: {error.message}",
                                    "correct the template, or use `text: plain`")) from error
        except _TEMPLATE_FAILS as error:
            cause = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise DataError(Problem(self._place, "data.text", "", f"fails on one question and answer: {cause}",
                                    "correct the template, or use `text: plain`")) from error
        if _PROBE not in full:
            raise DataError(Problem(self._place, "data.text", "", "does not write the assistant's text",
                                    "correct the template, or use `text: plain`"))
        return full[full.rindex(_PROBE) + len(_PROBE) :]

    def _find_end(self) -> TurnEnd:
        """Up to the first added token after the answer; what a template writes after it is not trained on."""
        added = self._tokenizer.added_tokens_decoder
        found = [(self._suffix.index(t.content), -len(t.content), token, t.content)
                 for token, t in added.items() if t.content and t.content in self._suffix]
        if found:
            position, _, token, content = min(found)
            return TurnEnd(self._suffix[: position + len(content)], token, appended=False)
        eos = self._tokenizer.eos_token_id
        return TurnEnd(self._suffix, eos, appended=eos is not None)

    def _accepts_system(self) -> bool:
        probe = [Message("system", "system"), Message("user", "question"), Message("assistant", _PROBE)]
        try:
            self._render(probe, opens_answer=False)
        except _TEMPLATE_FAILS:
            return False  # a plain conversation went through before, so this is about the system turn
        return True


_NO_END = "the tokenizer has no end-of-turn token: completions end without one, samples run to their limit"


def _without_end(text: str, end: str) -> str:
    """Rows that already bring the end of the turn as text must not end twice."""
    stripped = text.rstrip()
    while end and stripped.endswith(end):
        text = stripped = stripped.removesuffix(end)
        stripped = stripped.rstrip()
    return text


def _fold_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    if not system:
        return tuple(rest)
    first = next(i for i, m in enumerate(rest) if m.role == "user")
    rest[first] = Message("user", f"{system}\n\n{rest[first].content}")
    return tuple(rest)


def _roles(messages: Sequence[Message]) -> str:
    roles = [m.role for m in messages]
    return f"the turns {', '.join(roles[:8])}{', ...' if len(roles) > 8 else ''}"
