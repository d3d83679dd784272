"""One spec from several layers: a file, the files it `extends`, and `--set` lines; then its paths made absolute.

Mappings merge key by key, except where the new layer *names another thing*: then what belonged to the old
thing goes with it (a LoRA rank does not survive `kind: none`). Knows shapes, not rules of values.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prefopt_ray.errors import Problem, SpecError
from prefopt_ray.spec.yaml_source import Node, Origin, describe, read_file, read_value

KeyPath = tuple[str, ...]

SET_EXAMPLE = "write --set training.steps=100"
PARTS = ("train", "select", "test")
DATA_ENDINGS = tuple(kind + gz for kind in (".json", ".jsonl", ".ndjson", ".csv", ".parquet") for gz in ("", ".gz"))

# What a setting leaves unread. Merging drops these keys when the setting changes, the rules refuse them when
# they are written beside it, and a dumped spec does not hold them.
UNREAD: dict[tuple[KeyPath, str], dict[str, frozenset[str]]] = {
    (("model", "adapter"), "kind"): {"none": frozenset({"rank", "alpha", "target"})},
    (("training", "optimizer"), "kind"): {
        "adamw": frozenset({"momentum"}),
        "sgd": frozenset({"betas", "eps"}),
    },
    (("search",), "method"): {"grid": frozenset({"trials_per_loss"})},
    (("judge",), "at"): {"end": frozenset({"time_limit_s"})},
    (("scheduler",), "kind"): {
        "asha": frozenset({"stop_steps"}),
        "asha_promotion": frozenset({"stop_steps"}),
        "lockstep": frozenset({"stop_steps"}),
        "none": frozenset({"preset", "first_rung", "keep_one_in", "within", "stop_steps"}),
        "fixed": frozenset({"preset", "first_rung", "keep_one_in", "within"}),
    },
}

# A key of one group in the new layer drops the keys of the other groups in the old one.
_ALTERNATIVES: dict[KeyPath, tuple[frozenset[str], ...]] = {
    ("training",): (frozenset({"epochs"}), frozenset({"pairs"}), frozenset({"steps"})),
    ("scheduler",): (frozenset({"preset"}), frozenset({"first_rung", "keep_one_in"})),
    ("judge",): (frozenset({"reward_model"}), frozenset({"callable"}), frozenset({"endpoint"})),
    **{
        ("data", part): (frozenset({"from"}), frozenset({"source", "revision", "split", "data_dir", "files"}))
        for part in PARTS
    },
}

# Replaced as a whole: what stands in the new layer is all there is.
_WHOLE = (("search", "losses"), ("model", "reference"))


def read_layers(path: Path, *, seen: tuple[Path, ...] = (), source: str | None = None) -> Node:
    """The file merged over the files it extends. Raises SpecError, also for a cycle."""
    root = read_file(path, source=source)
    return _extend(root, seen=(*seen, path.resolve()))


def extend_text(root: Node) -> Node:
    """The same for a root that is not a file: its `extends` is relative to its folder."""
    return _extend(root, seen=())


def apply_overrides(root: Node, overrides: Sequence[str]) -> Node:
    """`a.b=c` lines set exactly that key, in order. Raises SpecError with every malformed line."""
    settings, problems = [], []
    for line in overrides:
        try:
            settings.append(_parse_override(line))
        except SpecError as error:
            problems.extend(error.problems)
    # All first drop what they displace, so that `training.steps=9` after `data.train.source=x` undoes nothing.
    for path, value in settings:
        root = _displace_at(root, path, value)
    for path, value in settings:
        try:
            root = _set(root, path, value, done=())
        except SpecError as error:
            problems.extend(error.problems)
    if problems:
        raise SpecError(*problems)
    return root


def without_nulls(node: Node, path: KeyPath = ()) -> Node:
    """`null` means absent, so the default holds; a loss with nothing behind it means `{}`."""
    if not isinstance(node.value, dict):
        return node
    entries = {}
    for key, child in node.value.items():
        if child.value is not None:
            entries[key] = without_nulls(child, (*path, key))
        elif path == ("search", "losses"):
            entries[key] = Node({}, child.origin)
    return Node(entries, node.origin)


def resolve_paths(root: Node) -> tuple[Node, list[Problem]]:
    """Local models, data files and templates become absolute, relative to the file that names them.

    A value is a path if it starts with `.`, `~` or `/`, has a data file's ending, or exists there; anything else
    (`Qwen/Qwen2.5-0.5B`, `gold`) stays as it is. What can be no path at all is a problem.
    """
    found: list[Problem] = []
    for path in path_keys():

        def absolute(node: Node, path: KeyPath = path) -> Node:
            try:
                return _absolute(node)
            except NO_PATH as error:
                found.append(Problem(node.origin.place, ".".join(path), describe(node.value), no_path(error)))
                return node

        root = _map_at(root, path, absolute)
    return root, found


# What pathlib raises for a text that names no place: no such user's home, a name too long, a NUL.
NO_PATH = (OSError, RuntimeError, ValueError)


def no_path(error: Exception) -> str:
    """The rule that such a text breaks."""
    if isinstance(error, RuntimeError):
        return "there is no user of this name: ~ is followed by / or by a user"
    return f"cannot be a path: {getattr(error, 'strerror', None) or error}"


def _extend(root: Node, *, seen: tuple[Path, ...]) -> Node:
    parent = root.entry("extends")
    if parent is None or not isinstance(root.value, dict):
        return root
    own = Node({key: node for key, node in root.value.items() if key != "extends"}, root.origin)
    if parent.value is None:
        return own
    base = _read_parent(parent, seen)
    return _merge(base, own, ())


def _read_parent(parent: Node, seen: tuple[Path, ...]) -> Node:
    def refusal(rule: str, fix: str) -> SpecError:
        return SpecError(Problem(parent.origin.place, "extends", describe(parent.plain()), rule, fix))

    if not isinstance(parent.value, str):
        raise refusal("names one other spec", "write `extends: other.yaml`")
    try:
        path = parent.origin.folder / Path(parent.value).expanduser()
        exists, circle = path.is_file(), path.resolve() in seen
    except NO_PATH as error:
        raise refusal(no_path(error), "write `extends: other.yaml`") from error
    if circle:
        raise refusal("these specs extend each other in a circle", "remove one `extends`")
    if not exists:
        raise refusal("no such file", "the path is relative to the file that says `extends`")
    shown = os.path.normpath(Path(parent.origin.source).parent / Path(parent.value).expanduser())
    return read_layers(path, seen=seen, source=shown)


def _merge(base: Node, new: Node, path: KeyPath) -> Node:
    if not (isinstance(base.value, dict) and isinstance(new.value, dict)) or _is_whole(path):
        return new
    entries = dict(_without_displaced(base, new, path).value)
    for key, node in new.value.items():
        entries[key] = _merge(entries[key], node, (*path, key)) if key in entries else node
    return Node(entries, new.origin)


def _is_whole(path: KeyPath) -> bool:
    return path in _WHOLE or (len(path) == 3 and path[:2] == ("search", "shared"))


def _without_displaced(base: Node, new: Node, path: KeyPath) -> Node:
    """`base` without the keys that make no sense beside those of `new`."""
    gone = set(_displaced(base, new, path))
    return Node({key: node for key, node in base.value.items() if key not in gone}, base.origin)


def _displaced(base: Node, new: Node, path: KeyPath) -> Iterator[str]:
    for (where, key), unread in UNREAD.items():
        setting = new.entry(key)
        if where == path and setting is not None:
            yield from unread.get(str(setting.value), ())
    groups = _ALTERNATIVES.get(path, ())
    for group in groups:
        if any(key in new.value for key in group):
            for other in groups:
                yield from other - group
    if path[:1] == ("data",) and path[1:] and path[1] in PARTS and {"source", "from"} & set(new.value):
        yield from base.value  # another source has other splits and another size
    if path == ("search", "baseline") and "loss" in new.value and _differs(base, new, "loss"):
        yield from base.value  # a beta belongs to its loss


def _differs(base: Node, new: Node, key: str) -> bool:
    old = base.entry(key)
    return old is None or old.value != new.value[key].value


def _parse_override(line: str) -> tuple[KeyPath, Node]:
    origin = Origin(f"--set {line}", Path.cwd(), one_line=True)
    key, equals, text = line.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        rule = "must be key=value, the key's parts joined by dots"
        raise SpecError(Problem(f"--set {line}", "", "", rule, SET_EXAMPLE))
    return path, read_value(text, origin)


def _displace_at(root: Node, path: KeyPath, value: Node) -> Node:
    """Drop beside `path` what setting it to `value` makes meaningless."""
    setting = Node({path[-1]: value}, value.origin)

    def drop(parent: Node) -> Node:
        return _without_displaced(parent, setting, path[:-1]) if parent.is_mapping else parent

    return _map_at(root, path[:-1], drop)


def _set(node: Node, path: KeyPath, value: Node, *, done: KeyPath) -> Node:
    if not path:
        return value
    if node.value is None:
        node = Node({}, value.origin)
    if not isinstance(node.value, dict):
        rule = f"{'.'.join(done)} is {describe(node.plain())}, it has no keys"
        fix = f"set it as a whole: --set {'.'.join(done)}=..."
        raise SpecError(Problem(value.origin.source, ".".join((*done, *path)), "", rule, fix))
    child = node.value.get(path[0], Node({}, value.origin))
    return Node({**node.value, path[0]: _set(child, path[1:], value, done=(*done, path[0]))}, node.origin)


def _map_at(node: Node, path: KeyPath, change: Callable[[Node], Node]) -> Node:
    """`node` with the value at `path` changed, if it is there."""
    if not path:
        return change(node)
    child = node.entry(path[0])
    if child is None:
        return node
    return Node({**node.value, path[0]: _map_at(child, path[1:], change)}, node.origin)


def path_keys() -> Iterator[KeyPath]:
    """Keys whose values may be files or folders."""
    yield from (("model", "policy"), ("model", "start_adapter"), ("data", "text"))
    yield from (("model", "reference", "model"), ("model", "reference", "adapter"))
    yield from (("judge", "reward_model"), ("judge", "callable"), ("judge", "endpoint", "template"))
    for part in PARTS:
        yield ("data", part, "source")


_WORDS = ("gold", "bandit", "template", "plain")  # never a folder that happens to have this name


def _absolute(node: Node) -> Node:
    written = node.value
    if not isinstance(written, str) or not written or written in _WORDS or "://" in written:
        return node
    if (function := _function_of_file(written)) is not None:
        file, name = function
        return Node(f"{os.path.normpath(node.origin.folder / Path(file).expanduser())}:{name}", node.origin)
    path = Path(written).expanduser()
    named_as_path = written.startswith((".", "~", "/")) or written.endswith((*DATA_ENDINGS, ".jinja"))
    local = node.origin.folder / path
    if named_as_path or local.exists():
        return Node(os.path.normpath(local), node.origin)
    return node


def _function_of_file(written: str) -> tuple[str, str] | None:
    """(file, name) of `FILE.py:name`."""
    file, colon, name = written.rpartition(":")
    return (file, name) if colon and file.endswith(".py") else None
