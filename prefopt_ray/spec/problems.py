"""From a failed check to a message a researcher can act on: place, key, value found, rule, fix.

Translates pydantic's errors, finds the line of a key, suggests what an unknown key meant, and knows which keys
of later versions are known but not honoured yet.
"""

import difflib
import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from prefopt_ray.errors import Problem
from prefopt_ray.spec.layers import KeyPath
from prefopt_ray.spec.rules import Finding
from prefopt_ray.spec.sections import DIVERGENCE_KEYS, DIVERGENCE_RULE, divergence_fix
from prefopt_ray.spec.space import reads_as_number
from prefopt_ray.spec.yaml_source import MAX_INTEGER, Node, describe

NOT_YET = "known, but not supported yet"
_REQUIRED = "is required"

# Keys of the full spec that this version does not honour, and what to do today.
_NOT_YET_KEYS: dict[KeyPath, str] = {
    ("checkpoints",): "remove it; the best and the last two of each trial are kept",
    ("resources", "gpus"): "remove it; CUDA_VISIBLE_DEVICES chooses GPUs, gpus_per_trial says how many a trial takes",
    ("resources", "shard"): "remove it; one trial runs on one GPU",
}
_NOT_YET_VALUES: dict[tuple[KeyPath, str], str] = {
    (("objective", "drift_limit"), "stop"): "use flag; the drift is in every table",
    (("resources", "trials_per_gpu"), "auto"): "name a number, 1 is safe",
}


def take_out_unsupported(root: Node) -> tuple[Node, list[Problem]]:
    """The tree without keys and values that are known but not honoured yet, and a problem for each."""
    problems = []
    for path, fix in _NOT_YET_KEYS.items():
        if (node := find(root, path)) is not None:
            problems.append(_problem(node, path, rule=NOT_YET, fix=fix))
            root = _without(root, path)
    for (path, value), fix in _NOT_YET_VALUES.items():
        node = find(root, path)
        if node is not None and node.value == value:
            problems.append(_problem(node, path, rule=f"{value} is {NOT_YET}", fix=fix))
            root = _without(root, path)
    return root, problems


def unknown_and_empty(root: Node, model: type[BaseModel]) -> Iterator[Problem]:
    """Unknown keys with nothing behind them, before `null means absent` removes them: `{steps: 1,000}` is one
    step and a key 000."""
    known = [key for key, _ in _keys(model, ())]
    sections = {key[:-1] for key in known}
    for path, node in _scalars(root, ()):
        expected = path in known or path in _NOT_YET_KEYS or path == ("extends",)
        if node.value is None and path[:-1] in sections and not expected:
            yield Problem(node.origin.place, _dotted(path), "", *_unknown_key(path, model))


def from_finding(finding: Finding, root: Node) -> Problem:
    node = find(root, finding.path)
    found = node if node is not None and not node.is_mapping else None
    return Problem(
        nearest(root, finding.path).origin.place,
        _dotted(finding.path),
        describe(found.plain()) if found else "",
        finding.rule,
        finding.fix,
    )


def from_pydantic(error: ErrorDetails, root: Node, model: type[BaseModel]) -> Problem:
    """One validation error of `model` in the words of the spec."""
    path = _path_in(root, error["loc"])
    kind = error["type"]
    node = nearest(root, path)
    if kind == "extra_forbidden":
        return Problem(node.origin.place, _dotted(path), "", *_unknown_key(path, model))
    if kind == "missing":
        return Problem(node.origin.place, _dotted(path), "", _REQUIRED, _EXAMPLES.get(".".join(path), ""))
    rule, fix = _rule(error, path)
    found = "" if path in _MAY_HOLD_SECRETS else describe(error["input"])
    return Problem(node.origin.place, _dotted(path), found, rule, fix)


def unreadable(root: Node) -> Iterator[Problem]:
    """Values that no key takes: control characters, half characters, and integers that no count or seed needs
    (YAML text refuses those while reading, a Python dict arrives unchecked)."""
    for path, node in _scalars(root, ()):
        if isinstance(node.value, int) and abs(node.value) > MAX_INTEGER:
            yield _problem(node, path, rule=f"whole numbers go up to {MAX_INTEGER}", fix="")
        elif isinstance(node.value, str) and _NO_TEXT.search(node.value):
            yield _problem(node, path, rule=_NO_TEXT_RULE, fix="remove it")


def without_consequences(found: list[Problem]) -> list[Problem]:
    """Without `training is required` where `trainning` was asked "did you mean training?"."""
    meant = {problem.fix for problem in found}
    return [p for p in found if p.rule != _REQUIRED or f"did you mean {p.key.rpartition('.')[2]}?" not in meant]


def find(root: Node, path: KeyPath) -> Node | None:
    """The node at a path; list items are addressed by their number."""
    node: Node | None = root
    for key in path:
        if node is None:
            return None
        if isinstance(node.value, tuple):
            node = node.value[int(key)] if key.isdecimal() and int(key) < len(node.value) else None
        else:
            node = node.entry(key)
    return node


def nearest(root: Node, path: KeyPath) -> Node:
    """The node at a path, or the mapping it is missing from."""
    for end in range(len(path), 0, -1):
        if (node := find(root, path[:end])) is not None:
            return node
    return root


# A key pasted here by mistake is not repeated in an error, which ends in logs.
_MAY_HOLD_SECRETS: tuple[KeyPath, ...] = (
    ("judge", "endpoint", "key_env"), ("judge", "endpoint", "url"), ("secrets",)
)
_NO_TEXT_RULE = "holds a line break, a control character or half a character"
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

_EXAMPLES = {
    "name": "add name: my-sweep",
    "model": "add model: {policy: Qwen/Qwen2.5-0.5B-Instruct}",
    "model.policy": "a hub id, a local folder, gold or bandit",
    "data": "add data: {train: {source: pairs.jsonl}}",
    "data.train": "add train: {source: pairs.jsonl}",
    "data.columns": "add columns: {prompt: question}",
    "model.adapter": "add adapter: {kind: lora, rank: 16}",
    "training": "add training: {epochs: 1}",
    "training.optimizer": "add optimizer: {kind: adamw}",
    "scheduler": "add scheduler: {kind: asha}",
    "search.shared": "add shared: {learning_rate: 5e-6}",
    "search": "add search: {trials_per_loss: 8, losses: {sigmoid: {}}}",
    "search.losses": "add losses: {sigmoid: {}, ipo_sum: {}}",
    "replicates.seeds": "add seeds: [1, 2, 3]",
    "confirm.seeds": "add seeds: [11, 12]",
}

_COMPARISONS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}
_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
}
_MAPPINGS = ("model_type", "model_attributes_type", "dict_type", "dataclass_type", "mapping_type")


def _rule(error: ErrorDetails, path: KeyPath) -> tuple[str, str]:
    """(rule, fix) of a value that is there but wrong."""
    kind, context = error["type"], error.get("ctx", {})
    name = path[-1] if path else ""
    if path[:2] == ("search", "losses") and len(path) == 4 and name in DIVERGENCE_KEYS:
        return DIVERGENCE_RULE, divergence_fix(path[2], error["input"])
    if kind == "rule":
        return context["rule"], context["fix"]
    if kind in _COMPARISONS:
        sign, bound = _COMPARISONS[kind]
        return f"{name} must be {sign} {context[bound]:g}", ""
    if kind == "literal_error":
        valid = _quoted(context["expected"])
        return f"must be {_or(valid)}", _meant(str(error["input"]), valid)
    if kind in _MAPPINGS:
        example = _EXAMPLES.get(".".join(path), "").removeprefix("add ")
        if path[:2] == ("search", "losses") and len(path) == 3:
            example = f"{_dotted(path[2:])}: {{beta: 0.1}}"
        return "must be a mapping of keys to values", f"such as {example}" if example else "indent its keys below it"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty", _EXAMPLES.get(".".join(path), "")
    if kind == "string_pattern_mismatch" and path == ("name",):
        return "letters, digits and . _ - only, at most 80: it names folders and runs", ""
    if kind in ("missing", "too_long"):
        return "has the wrong number of items", ""
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters", ""
    if kind in _TYPES:
        return _TYPES[kind], _as_number(error["input"], whole=kind.startswith("int"))
    return error["msg"][:1].lower() + error["msg"][1:], ""


def _unknown_key(path: KeyPath, model: type[BaseModel]) -> tuple[str, str]:
    """(rule, fix): a close key beside it, the same key elsewhere, or the list of what is valid here."""
    name = path[-1]
    section = ".".join(path[:-1])
    every = dict(_keys(model, ()))
    siblings = [key[-1] for key in every if key[:-1] == path[:-1]]
    siblings += [key[-1] for key in _NOT_YET_KEYS if key[:-1] == path[:-1]]
    rule = f"unknown key{f' of {section}' if section else ''}; known are {', '.join(siblings)}"
    if not siblings:
        rule = "unknown key"
    if close := _meant(name, siblings):
        return rule, close
    elsewhere = [".".join(key) for key in every if key[-1] == name] or _SEARCH_KEYS.get(name, [])
    return rule, f"did you mean {' or '.join(elsewhere[:2])}?" if elsewhere else ""


_SEARCH_KEYS = {
    "beta": ["search.losses.<loss>.beta"],
    "learning_rate": ["search.shared.learning_rate"],
    "lr": ["search.shared.learning_rate"],
    "loss": ["search.losses"],
    "batch_size": ["training.batch_pairs"],
    "max_length": ["data.max_tokens"],
    "num_train_epochs": ["training.epochs"],
    "dataset": ["data.train.source"],
}


def _keys(model: type[BaseModel], prefix: KeyPath) -> Iterator[tuple[KeyPath, None]]:
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        yield path, None
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys(inner, path)


def _path_in(root: Node, loc: tuple[int | str, ...]) -> KeyPath:
    """A pydantic location as keys of the tree: it adds markers (`[key]`) where a mapping's key is wrong."""
    return tuple(str(part) for part in loc if part != "[key]")


def _without(node: Node, path: KeyPath) -> Node:
    if len(path) == 1:
        return Node({key: child for key, child in node.value.items() if key != path[0]}, node.origin)
    return Node({**node.value, path[0]: _without(node.value[path[0]], path[1:])}, node.origin)


def _problem(node: Node, path: KeyPath, *, rule: str, fix: str) -> Problem:
    return Problem(node.origin.place, _dotted(path), describe(node.plain()), rule, fix)


def _dotted(path: KeyPath) -> str:
    """A key as people write it; one that is no word (a whole line, an escape code) shortened and escaped."""
    return ".".join(part if part.isprintable() and len(part) <= 80 else describe(part) for part in path)


def _quoted(expected: str) -> list[str]:
    """pydantic's "'a', 'b' or 'c'" as a list."""
    return [part for part in expected.split("'") if part and part not in (", ", " or ")]


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _meant(written: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(written, valid, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _as_number(value: Any, *, whole: bool) -> str:
    """How a number that was written in another way is written here."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INTEGER:
        return f"write {value:.0f}, without a point or an exponent"
    if not isinstance(value, str):
        return ""
    if reads_as_number(value) and (not whole or value.strip().lstrip("+-").isdecimal()):
        return "remove the quotes"
    try:
        number = int(value.replace(",", ""), 0)  # 1_000, 1,000, 0o17, 0x10
    except ValueError:
        return ""
    return f"write {number}" if abs(number) <= MAX_INTEGER else ""


def _scalars(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, Node]]:
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _scalars(child, (*path, key))
    elif isinstance(node.value, tuple):
        for index, child in enumerate(node.value):
            yield from _scalars(child, (*path, str(index)))
    else:
        yield path, node
