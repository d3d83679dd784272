"""YAML text -> a tree of located values: every value remembers its file, line and folder.

Reads YAML 1.2's plain values (`5e-6` is a number, `no` is a word) and refuses what a spec never needs:
tags, duplicate keys, several documents, alias bombs. Knows nothing of what the keys mean.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from prefopt_ray.errors import Problem, SpecError

Scalar = str | int | float | bool | None

# A spec is a page of text. The limits only stop accidents (a data file given as a spec) and alias bombs.
MAX_CHARACTERS = 1_000_000
MAX_VALUES = 20_000
MAX_DEPTH = 24
# Floats, JSON and MLflow keep integers exactly up to here; no count, step or seed needs more.
MAX_INTEGER = 2**53


@dataclass(frozen=True)
class Origin:
    """Where a value was written; `folder` is where its relative paths start. A one-line source has no line."""

    source: str
    folder: Path
    line: int | None = None
    one_line: bool = False

    @property
    def place(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A scalar, a list or a mapping, and where it was written (a mapping's entry: the line of its key)."""

    value: "Scalar | tuple[Node, ...] | dict[str, Node]"
    origin: Origin

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.value, dict)

    def entry(self, key: str) -> "Node | None":
        return self.value.get(key) if isinstance(self.value, dict) else None

    def plain(self) -> Any:
        """The value as Python's own dict, list and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


def read_file(path: Path, *, source: str | None = None) -> Node:
    """The file's root mapping. Raises SpecError: unreadable, not UTF-8, not YAML, not a mapping."""
    origin = Origin(source or str(path), path.absolute().parent)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _refusal(origin, rule="no such file", fix=_nearby_specs(path)) from None
    except OSError as error:
        raise _refusal(origin, rule=f"cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refusal(
            origin, line, found=f"byte 0x{data[error.start]:02x}", rule="a spec is UTF-8 text", fix="save it as UTF-8"
        ) from None
    return read_mapping(text, origin)


def read_mapping(text: str, origin: Origin) -> Node:
    """The root mapping of YAML text. Raises SpecError with every duplicate key and unreadable value at once."""
    root = read_value(text, origin)
    if root.value is None:
        raise _refusal(origin, 1, rule="the spec is empty", fix="start with `name:`, `model:`, `data:`")
    if not root.is_mapping:
        rule = "a spec is a mapping of keys at the top level"
        raise _refusal(origin, 1, found=describe(root.plain()), rule=rule, fix="start with `name: my-sweep`")
    return root


def read_value(text: str, origin: Origin) -> Node:
    """Any YAML value, such as the right side of a `--set`."""
    if len(text) > MAX_CHARACTERS:
        rule = f"a spec has at most {MAX_CHARACTERS:,} characters"
        raise _refusal(origin, found=f"{len(text):,}", rule=rule, fix="is this a data file?")
    try:
        _refuse_tags_and_depth(text, origin)
        composed = yaml.compose(text, Loader=_SpecLoader)
    except yaml.YAMLError as error:
        raise _syntax_refusal(error, text, origin) from None
    if composed is None:
        return Node(None, _at(origin, 1))
    reader = _Reader(origin)
    root = reader.node(composed, (), line=composed.start_mark.line + 1)
    if reader.problems:
        raise SpecError(*reader.problems)
    return root


def from_python(value: Any, origin: Origin) -> Node:
    """The same tree from Python values (a notebook's dict). Raises SpecError for anything YAML could not hold."""
    if isinstance(value, Mapping):
        return Node({str(key): from_python(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, (list, tuple)):
        return Node(tuple(from_python(item, origin) for item in value), origin)
    if isinstance(value, Path):
        return Node(str(value), origin)
    if value is None or isinstance(value, (str, int, float)):
        return Node(value, origin)
    rule = "a spec holds numbers, text, lists and mappings"
    raise _refusal(origin, found=f"a Python {type(value).__name__}", rule=rule)


def to_text(plain: Any) -> str:
    """YAML that both this module and any YAML 1.1 reader read back as the same values."""
    return yaml.dump(plain, Dumper=_SpecDumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def describe(value: Any) -> str:
    """A found value for a message: short, on one line, control characters escaped."""
    if isinstance(value, dict):
        inner = ", ".join(f"{key}: {describe(item)}" for key, item in value.items())
        return _shorten("{" + inner + "}")
    if isinstance(value, (list, tuple)):
        return _shorten("[" + ", ".join(describe(item) for item in value) + "]")
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return _shorten(repr(value))


def _shorten(text: str, limit: int = 70) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _SpecLoader(yaml.SafeLoader):
    """Only YAML 1.2's core values are implicit: no dates, no `yes`, no base 60."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _SpecDumper(yaml.SafeDumper):
    """Quotes a text that either YAML 1.1 or 1.2 would read as something else. Writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_CORE_VALUES = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)
for _kind, _pattern, _first in _CORE_VALUES:
    for _class in (_SpecLoader, _SpecDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


class _Reader:
    """Composed YAML nodes -> located nodes, collecting problems so that all are reported."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.problems: list[Problem] = []
        self.values = 0

    def node(self, composed: yaml.Node, path: tuple[str, ...], *, line: int) -> Node:
        self.values += 1
        if self.values > MAX_VALUES or len(path) > MAX_DEPTH:
            # Depth is aliases': plain nesting was bounded before composing.
            rule = f"more than {MAX_VALUES:,} values, or aliases (*name) that expand into so many"
            raise _refusal(self.origin, line, rule=rule, fix="write fewer values; ranges and `extends` help")
        origin = _at(self.origin, line)
        if isinstance(composed, yaml.MappingNode):
            return Node(self.mapping(composed, path), origin)
        if isinstance(composed, yaml.SequenceNode):
            items = enumerate(composed.value)
            return Node(tuple(self.node(v, (*path, str(i)), line=v.start_mark.line + 1) for i, v in items), origin)
        return Node(self.scalar(composed, path, line=line), origin)

    def mapping(self, composed: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key, value in composed.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.problem(line, path, found="a list or mapping", rule="a key is one word")
            elif key.value == "<<":
                self.problem(line, (*path, "<<"), rule="merge keys are not read", fix="use `extends: other.yaml`")
            elif key.value in entries:
                first = entries[key.value].origin.line
                rule = f"this key is already on line {first}"
                self.problem(line, (*path, key.value), rule=rule, fix="keep one of them")
            else:
                entries[key.value] = self.node(value, (*path, key.value), line=line)
        return entries

    def scalar(self, composed: yaml.ScalarNode, path: tuple[str, ...], *, line: int) -> Scalar:
        kind = composed.tag.rpartition(":")[2]
        text = composed.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            # Digits are counted first: Python refuses to convert thousands of them.
            if len(text) > 40 or abs(int(text)) > MAX_INTEGER:
                self.problem(line, path, found=_shorten(text), rule=f"whole numbers go up to {MAX_INTEGER}")
                return 0
            return int(text)
        if kind == "float":
            # YAML writes .inf and .nan; they stay floats here and are refused by the rule of their key.
            return float(text.replace(".", "") if text[-1].isalpha() else text)
        return text

    def problem(self, line: int, path: tuple[str, ...], *, found: str = "", rule: str, fix: str = "") -> None:
        self.problems.append(Problem(_at(self.origin, line).place, ".".join(path), found, rule, fix))


def _refuse_tags_and_depth(text: str, origin: Origin) -> None:
    """One flat pass over the parser's events, before anything recursive touches the text."""
    depth = 0
    for event in yaml.parse(text, Loader=_SpecLoader):
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            rule = "a spec holds plain values; tags (!...) are not read"
            found = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _refusal(origin, line, found=found, rule=rule, fix="remove the tag")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _refusal(origin, line, rule=f"nested deeper than {MAX_DEPTH} levels", fix="is a bracket left open?")


# What editors, chats and input methods put in the place of a space, a colon, a comma, a quote, a bracket.
_LOOK_ALIKES = re.compile(
    "[\u00a0\u2000-\u200f\u2018-\u201f\u2028\u2029\u202f\u3000\ufeff\uff0c\uff1a\uff3b\uff3d\uff5b\uff5d]"
)

# (part of the parser's message, what it means, fix)
_SYNTAX = (
    ("'\\t'", "YAML is not indented with tabs", "indent with spaces"),
    ("another document", "one file is one spec", "remove the line `---` and what follows"),
    ("cannot start any token", "a value cannot begin with this character", "put the value in quotes"),
    ("mapping values are not", "two keys on one line, or uneven indentation", "a value with ': ' inside needs quotes"),
    ("could not find expected ':'", "a key without a value", "write `key: value`, with a colon and a space"),
    ("expected ',' or", "a bracket or brace is not closed, or a comma is missing", "close it on this line"),
    ("expected <block end>", "uneven indentation", "align this line with the keys above it"),
    ("<document start>", "one file is one spec", "remove the line `...` and what follows"),
    ("second occurrence", "an anchor (&name) is given twice", "a value that begins with & needs quotes"),
    ("unexpected end of stream", "a quote is not closed", "close it on this line"),
    ("undefined alias", "*name refers to nothing", "a value that begins with * needs quotes"),
)


def _syntax_refusal(error: yaml.YAMLError, text: str, origin: Origin) -> SpecError:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1
        found = describe(text[position : position + 1])
        return _refusal(origin, line, found=found, rule="a spec is plain text", fix="remove the control character")
    # For something left open, the line where it was opened helps; the parser stops far below it.
    left_open = error.context is not None and error.context_mark is not None and "flow" in error.context
    left_open = left_open or (error.context or "").startswith("while scanning a quoted")
    mark = error.context_mark if left_open and error.context_mark else error.problem_mark
    lines = text.splitlines()
    written = lines[mark.line].strip() if mark.line < len(lines) else ""
    message = error.problem or "not readable"
    for number in (mark.line - 1, mark.line):  # a line that looks right to the eye and wrong to the parser
        if 0 <= number < len(lines) and (odd := _LOOK_ALIKES.search(lines[number].partition(" #")[0])):
            rule = f"{describe(odd.group())} (U+{ord(odd.group()):04X}) only looks like a sign of YAML"
            found = describe(lines[number].strip())
            return _refusal(origin, number + 1, found=found, rule=rule, fix="type it again as plain ASCII")
    meanings = ((rule, fix) for part, rule, fix in _SYNTAX if part in message)
    rule, fix = next(meanings, (f"not valid YAML: {message}", "check indentation, brackets and quotes"))
    return _refusal(origin, mark.line + 1, found=describe(written), rule=rule, fix=fix)


def _nearby_specs(path: Path) -> str:
    names = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f"specs in that folder: {', '.join(names[:8])}" if names else ""


def _at(origin: Origin, line: int) -> Origin:
    return origin if origin.one_line else replace(origin, line=line)


def _refusal(origin: Origin, line: int | None = None, *, found: str = "", rule: str, fix: str = "") -> SpecError:
    place = origin.place if line is None else _at(origin, line).place
    return SpecError(Problem(place, "", found, rule, fix))
