"""Load a spec: layers -> tree -> sections -> rules, and report every problem of all of them at once."""

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from prefopt_ray.errors import Problem, SpecError
from prefopt_ray.spec import layers, problems
from prefopt_ray.spec.model import SweepFields, SweepSpec
from prefopt_ray.spec.rules import findings
from prefopt_ray.spec.yaml_source import Node, Origin, from_python, read_mapping, to_text


def load_spec(path: Path, *, overrides: Sequence[str] = (), storage: str | None = None) -> SweepSpec:
    """A spec file with what it extends, then `--set` lines (`a.b=c`), then another storage folder.

    Relative models, data files and templates start at the file that names them (at the current folder in a
    `--set`); storage starts at the current folder. Raises SpecError with every problem found.
    """
    return _build(layers.read_layers(Path(path)), overrides=overrides, storage=storage)


def parse_spec(
    written: str | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    folder: Path | None = None,
) -> SweepSpec:
    """The same from YAML text or a dict (a notebook); relative paths start at `folder`, by default the current one."""
    home = (folder or Path.cwd()).absolute()
    if isinstance(written, str):
        root = read_mapping(written, Origin("spec text", home))
    else:
        root = from_python(written, Origin("spec", home, one_line=True))
    return _build(layers.extend_text(root), overrides=overrides, storage=storage)


def dump_spec(spec: SweepSpec) -> str:
    """YAML of the spec as resolved: absolute paths, every default written out. Loads to an equal spec."""
    return to_text(spec.to_dict())


def _build(root: Node, *, overrides: Sequence[str], storage: str | None) -> SweepSpec:
    root = layers.apply_overrides(root, overrides)
    if storage is not None:
        option = Node(storage, Origin("--storage", Path.cwd(), one_line=True))
        root = Node({**root.value, "storage": option}, root.origin)
    found = list(problems.unknown_and_empty(root, SweepFields))
    root, no_paths = layers.resolve_paths(layers.without_nulls(root))
    root, unsupported = problems.take_out_unsupported(root)
    found += [*no_paths, *unsupported, *problems.unreadable(root)]
    sections, broken = _sections(root)
    found += broken
    found += (problems.from_finding(finding, root) for finding in findings(sections))
    if found:
        raise SpecError(*_in_reading_order(_one_per_key(problems.without_consequences(found))))
    return SweepSpec(**sections)


def _sections(root: Node) -> tuple[dict[str, Any], list[Problem]]:
    """The sections that are valid in themselves, and what is wrong with the others."""
    plain = root.plain()
    try:
        fields = SweepFields.model_validate(plain)
    except ValidationError as error:
        details = error.errors(include_url=False)
        invalid = {str(detail["loc"][0]) for detail in details}
        broken = [problems.from_pydantic(detail, root, SweepFields) for detail in details]
        return dict(_valid_sections(plain, invalid)), broken
    return {name: getattr(fields, name) for name in SweepFields.model_fields}, []


def _valid_sections(plain: dict[str, Any], invalid: set[str]) -> Iterator[tuple[str, Any]]:
    for name, field in SweepFields.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))  # `Section | None` too
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if name not in invalid and section is not None:
            yield name, section.model_validate(plain[name]) if name in plain else field.default


def _one_per_key(found: list[Problem]) -> list[Problem]:
    """A value that is wrong in two ways is reported once, by the first and most basic rule."""
    first: dict[tuple[str, str], Problem] = {}
    for problem in found:
        first.setdefault((problem.place, problem.key), problem)
    return list(first.values())


def _in_reading_order(found: list[Problem]) -> list[Problem]:
    def position(problem: Problem) -> tuple[str, int]:
        source, _, line = problem.place.rpartition(":")
        return (source, int(line)) if line.isdecimal() else (problem.place, 0)

    return sorted(found, key=position)
