"""From a source to raw rows: hub id, folder, json, jsonl, csv (also .gz), parquet, or ready rows.

Knows files and their damage, not what a row means. A damaged file is refused with its line; a row that
is whole but makes no pair is the business of `shapes`. `datasets` is imported only here, and only
for hub ids and folders.
"""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.pairs.config import SourceConfig

MAX_PROBLEMS = 10  # of one file; more of the same do not help a reader
_JSON = (".json", ".jsonl", ".ndjson")
READABLE = (*_JSON, ".csv", ".parquet")
_FORMATS = "one of .json, .jsonl, .csv (each also .gz) and .parquet"
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # what `save_to_disk` of a Dataset and a DatasetDict writes


@dataclass(frozen=True)
class Row:
    """`number` counts from 0 over all files of a source, like `dataset[number]`; `place` is for people."""

    number: int
    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """An opened source: its content hash is known, its rows are parsed only when `read` is called."""

    name: str
    fingerprint: str  # sha256 over the content, not over paths or times
    read: Callable[[], list[Row]]


def open_source(config: SourceConfig) -> Source:
    """Raises DataError when the source does not exist or cannot be fetched; `read` raises it for damage."""
    if config.rows is not None:
        return _open_ready_rows(config)
    if "://" in config.source:
        raise DataError(Problem(config.source, "", "a link", "data is read from the hub or from local files",
                                "download it and name the file; a hub set is named by its id, such as org/pairs"))
    path = Path(config.source).expanduser()
    if path.is_file():
        _refuse_folder_keys(config)
        return _open_files(config.source, [path])
    if path.is_dir():
        if config.files:
            return _open_files(config.source, [path / name for name in config.files])
        return _open_with_datasets(config, str(path))
    if _looks_like_a_path(config.source):
        raise DataError(Problem(config.source, "", "nothing there", "the file or folder does not exist",
                                "a path is relative to the folder of the spec"))
    return _open_with_datasets(config, config.source)


def kind_of(value: Any) -> str:
    """How JSON calls a value, for messages: `a number (5)`."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"text ({_short(value)})"
    if isinstance(value, bool) or isinstance(value, int | float):
        return f"{'a truth value' if isinstance(value, bool) else 'a number'} ({value})"
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(repr, list(value)[:6])) or '(none)'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return type(value).__name__


def _short(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _refuse_folder_keys(config: SourceConfig) -> None:
    """Ignoring `split: test` on a file would select on the rows that are trained on."""
    keys = {"split": config.split != SourceConfig.split, "data_dir": config.data_dir, "files": config.files,
            "revision": config.revision}
    fix = "name another file, or carve the part out with `from: train`"
    problems = [Problem(config.source, key, ascii(getattr(config, key)), "a single file has no such thing", fix)
                for key, given in keys.items() if given]
    if problems:
        raise DataError(*problems)


def _looks_like_a_path(source: str) -> bool:
    # A hub id has at most one slash and no data suffix.
    stem = source.removesuffix(".gz")
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or stem.endswith((*READABLE, "/"))


def _open_ready_rows(config: SourceConfig) -> Source:
    rows = config.rows
    assert rows is not None
    content = json.dumps(rows, sort_keys=True, ensure_ascii=True, default=str)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    name = config.source
    return Source(name, fingerprint, lambda: [Row(i, f"{name} row {i}", values) for i, values in enumerate(rows)])


# --- local files -----------------------------------------------------------------------------------


def _open_files(name: str, paths: list[Path]) -> Source:
    digest = hashlib.sha256()
    contents = []
    for path in paths:
        suffix = _suffix(path)
        if suffix not in READABLE:
            found = suffix or "no suffix"
            raise DataError(Problem(str(path), "", found, "this kind of file is not supported", f"use {_FORMATS}"))
        data = _read_bytes(path)
        digest.update(f"{suffix}:{len(data)}:".encode() + data)
        contents.append((path, data))

    def read() -> list[Row]:
        found: list[tuple[str, Mapping[str, Any]]] = []
        for path, data in contents:
            before = len(found)
            found.extend(_parse(path, data))
            if len(found) == before:
                rule, fix = "the file holds no rows", "fetch it again, or name another"
                raise DataError(Problem(str(path), "", f"{len(data)} bytes", rule, fix))
        return [Row(number, place, values) for number, (place, values) in enumerate(found)]

    return Source(name, digest.hexdigest(), read)


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_bytes(path: Path) -> bytes:
    """The file's content, unpacked. Raises DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        fix = "check the name and the permissions"
        raise DataError(Problem(str(path), "", error.strerror or str(error), "cannot be read", fix)) from error
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        rule = f"is not a whole gzip file: {error}"
        raise DataError(Problem(str(path), "", f"{len(data)} bytes", rule, "fetch the file again")) from error


def _parse(path: Path, data: bytes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    suffix = _suffix(path)
    if not data.strip():
        raise DataError(Problem(str(path), "", f"{len(data)} bytes", "the file is empty", "fetch it again"))
    _refuse_other_kinds(path, data, suffix)
    if suffix == ".parquet":
        return _parse_parquet(path, data)
    text = _decode(path, data)
    if suffix == ".csv":
        return _parse_csv(path, text)
    if suffix == ".json" and not _is_json_lines(text):
        return _parse_json(path, text)
    return _parse_json_lines(path, text)


# How other files begin -> what they are, and what to do.
_OTHER_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the data itself: git lfs pull"),
    (b"\x1f\x8b", "gzip data", "add .gz to its name"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstandard data", "unpack it"),
    (b"PAR1", "parquet data", "name it .parquet"),
    (b"<!DOCTYPE", "a web page", "download the file itself, not the page that shows it"),
    (b"<html", "a web page", "download the file itself, not the page that shows it"),
)


def _refuse_other_kinds(path: Path, data: bytes, suffix: str) -> None:
    """Before a parser wonders about its first character."""
    first = data[:256].lstrip()
    for start, what, fix in _OTHER_KINDS:
        if first.startswith(start) and not (suffix == ".parquet" and start == b"PAR1"):
            raise DataError(Problem(str(path), "", what, f"its name says {suffix}", fix))


def _decode(path: Path, data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        found = "UTF-16 or UTF-32"
        raise DataError(Problem(f"{path}:1", "", found, "text must be UTF-8", "save the file as UTF-8"))
    try:
        return data.decode("utf-8-sig")  # a byte order mark is allowed and removed
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise DataError(Problem(f"{path}:{line}", "", found, "text must be UTF-8", "save the file as UTF-8")) from error


def _is_json_lines(text: str) -> bool:
    """Many hub files named .json hold one object per line."""
    first, _, rest = text.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_json(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(_json_problem(path, text, error, first_line=1)) from error
    if not isinstance(content, list):
        found = kind_of(content)
        if isinstance(content, dict):
            found = f"one object with the keys {', '.join(map(repr, list(content)[:6]))}"
        rule = "a .json file must be a list of objects, one per pair"
        raise DataError(Problem(f"{path}:1", "", found, rule, "put the rows into a list, or use .jsonl"))
    return _objects((f"{path} row {number}", value) for number, value in enumerate(content))


def _parse_json_lines(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    values: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    # Not splitlines(): that also breaks at U+2028 and friends, which are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((f"{path}:{number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(_json_problem(path, line, error, first_line=number))
    _raise_problems(problems)
    return _objects(iter(values))


def _objects(values: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    problems: list[Problem] = []
    for place, value in values:
        if isinstance(value, dict):
            rows.append((place, value))
        else:
            fix = 'write {"prompt": ..., "chosen": ..., "rejected": ...}'
            problems.append(Problem(place, "", kind_of(value), "a row must be an object", fix))
    _raise_problems(problems)
    return iter(rows)


def _raise_problems(problems: list[Problem]) -> None:
    if not problems:
        return
    shown = problems[:MAX_PROBLEMS]
    if len(problems) > len(shown):
        more = len(problems) - len(shown)
        shown.append(Problem(shown[-1].place, "", "", f"and {more} more problems of this kind after it"))
    raise DataError(*shown)


def _json_problem(path: Path, text: str, error: Exception, *, first_line: int) -> Problem:
    if isinstance(error, RecursionError):
        return Problem(f"{path}:{first_line}", "", "", "is nested too deeply to be read", "is this a file of pairs?")
    if not isinstance(error, json.JSONDecodeError):  # a number of thousands of digits
        cause = str(error).partition(":")[0]
        return Problem(f"{path}:{first_line}", "", "", f"is not readable JSON: {cause}", "is this a file of pairs?")
    line = first_line + error.lineno - 1
    at_the_end = not text[error.pos :].strip() or error.msg.startswith("Unterminated string")
    fix = "the text ends too early: is the file cut off? fetch it again" if at_the_end else "correct this line"
    rule = f"is not JSON: {error.msg} at column {error.colno}"
    return Problem(f"{path}:{line}", "", repr(text[error.pos : error.pos + 30]), rule, fix)


def _parse_csv(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses completions above 128 KiB
    # strict: an open quote is an error, not one field that swallows the rest of the file
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        fix = 'quote fields that hold line breaks; write " inside a field as ""'
        raise DataError(Problem(f"{path}:{reader.line_num}", "", "", f"is not CSV: {error}", fix)) from error
    finally:
        csv.field_size_limit(limit)
    header = lines[0][1]
    if len(set(header)) < len(header):
        raise DataError(Problem(f"{path}:1", "", ", ".join(map(repr, header)), "a column appears twice in the header",
                                "rename or remove one of the two; the first line must name the columns"))
    problems = [
        Problem(f"{path}:{line}", "", f"{len(cells)} fields", f"the header has {len(header)} columns",
                "put fields that hold commas into quotes")
        for line, cells in lines[1:] if len(cells) != len(header)
    ]
    _raise_problems(problems)
    if len(lines) == 1:
        raise DataError(Problem(f"{path}:1", "", "one line", "the file holds a header and no rows",
                                "the first line must name the columns"))
    return ((f"{path}:{line}", dict(zip(header, map(_csv_cell, cells)))) for line, cells in lines[1:])


def _csv_cell(cell: str) -> Any:
    """A cell is text, unless it is a message or a list of messages written as JSON."""
    if not cell.lstrip().startswith(("[{", '{"')):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    first = value[0] if isinstance(value, list) and value else value
    is_message = isinstance(first, dict) and ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys())
    return value if is_message else cell


def _parse_parquet(path: Path, data: bytes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read()  # read_table does not name a column twice
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        rule = f"is not a whole parquet file: {cause}"
        raise DataError(Problem(str(path), "", f"{len(data)} bytes", rule, "fetch the file again")) from error
    names = table.column_names
    if len(set(names)) < len(names):
        found = ", ".join(map(repr, names))
        raise DataError(Problem(str(path), "", found, "a column appears twice", "rename or remove one of the two"))
    return ((f"{path} row {number}", row) for number, row in enumerate(rows))


# --- hub ids and folders ---------------------------------------------------------------------------


def _open_with_datasets(config: SourceConfig, path: str) -> Source:
    tables = _load_tables(config, path)
    digest = hashlib.sha256()
    for table in tables:
        _hash_arrow(table, digest)
    label = f"{config.source}[{config.split}]"

    def read() -> list[Row]:
        rows = [row for table in tables for row in table.to_list()]
        if not rows:
            raise DataError(Problem(label, "", "0 rows", "the split holds no rows"))
        return [Row(number, f"{label} row {number}", row) for number, row in enumerate(rows)]

    return Source(label, digest.hexdigest(), read)


def _load_tables(config: SourceConfig, path: str) -> list[Any]:
    """One `datasets.Dataset` per data_dir, or one. Raises DataError with the cause."""
    import datasets

    try:
        if any((Path(path) / name).is_file() for name in _SAVED_TO_DISK):
            saved = datasets.load_from_disk(path)
            return [saved[config.split] if isinstance(saved, datasets.DatasetDict) else saved]
        options: dict[str, Any] = {"split": config.split, "revision": config.revision}
        if config.files:
            options["data_files"] = list(config.files)
        return [datasets.load_dataset(path, data_dir=folder, **options) for folder in config.data_dir or (None,)]
    # The library, its hub client, its HTTP client and its builders each raise families of their own with no
    # common base; all of them mean "this source cannot be had", and the cause is kept.
    except Exception as error:
        deepest = error
        while isinstance(deepest.__cause__, Exception):  # "An error occurred while generating the dataset"
            deepest = deepest.__cause__
        lines = str(deepest).strip().splitlines()
        cause = f"{type(deepest).__name__}: {lines[0] if lines else 'no message'}"
        place = f"{config.source}[{config.split}]"
        fix = _loading_fix(config, path)
        raise DataError(Problem(place, "", cause, "the data set cannot be loaded", fix)) from error


def _loading_fix(config: SourceConfig, path: str) -> str:
    if Path(path).is_dir():
        return f"name one file ({_FORMATS}), or list `files`, or check split {config.split!r}"
    return "check the id, `split`, `data_dir` and the network; gated sets need `hf auth login`; a local file works too"


def _hash_arrow(table: Any, digest: "hashlib._Hash") -> None:
    """Content, not the library's own fingerprint: that one holds modification times of its cache files."""
    import pyarrow

    for batch in table.with_format("arrow").iter(batch_size=1000):  # fixed slices: chunk borders must not matter
        sink = pyarrow.BufferOutputStream()
        plain = batch.combine_chunks().replace_schema_metadata(None)
        with pyarrow.ipc.new_stream(sink, plain.schema) as writer:
            writer.write_table(plain)
        digest.update(sink.getvalue())
