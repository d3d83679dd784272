"""What a submission carries to the cluster: the spec, and the files it names that lie on this machine.

Hub ids, URIs and paths that do not exist here are left alone: the cluster knows them. On the cluster the files go to
the sweep's storage, by content, so that a resumed sweep finds them whatever became of the job that brought them.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_ray.errors import Problem, SpecError
from prefopt_ray.spec import SweepSpec, dump_spec
from prefopt_ray.spec.layers import path_keys
from prefopt_ray.spec.load import load_spec

LIMIT = 100 * 2**20  # bytes of one upload that Ray's dashboard takes
SPEC, ORDER, FILES, UPLOADS = "spec.yaml", "order.json", "files", "uploads"


@dataclass(frozen=True)
class Order:
    """What the job is to do with the spec beside it."""

    files: Mapping[str, str]  # dotted key of the spec -> file or folder in the upload
    fresh: bool  # begin a new sweep even where this very spec has one
    versions: Mapping[str, str]  # prefopt, ray and python of the machine that submits

    def write(self, folder: Path) -> None:
        (folder / ORDER).write_text(json.dumps(vars(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Order":
        return cls(**json.loads((folder / ORDER).read_text(encoding="utf-8")))


def pack(spec: SweepSpec, folder: Path, *, fresh: bool, versions: Mapping[str, str]) -> None:
    """Everything that goes to the cluster into an empty folder. Raises SpecError for more than Ray takes."""
    local = dict(local_files(spec))
    sizes = {path: _size(path) for path in set(local.values())}
    if sum(sizes.values()) > LIMIT:
        raise SpecError(*(
            Problem(
                "spec", key, f"{path} ({sizes[path] / 2**20:,.0f} MiB)",
                f"local files are uploaded, {LIMIT / 2**20:.0f} MiB in all at most",
                "copy it to the cluster's shared storage and name it by its path there, or to a hub or bucket",
            )
            for key, path in local.items() if sizes[path] > LIMIT // 20
        ))
    names = {path: f"{FILES}/{number}/{path.name}" for number, path in enumerate(sizes)}
    for path, name in names.items():
        place = folder / name
        place.parent.mkdir(parents=True)
        shutil.copytree(path, place) if path.is_dir() else shutil.copyfile(path, place)
    (folder / SPEC).write_text(dump_spec(spec), encoding="utf-8")
    Order({key: names[path] for key, path in local.items()}, fresh, dict(versions)).write(folder)


def unpack(folder: Path, order: Order) -> SweepSpec:
    """The spec with its uploaded files in its storage, named by content. Raises SpecError."""
    spec = load_spec(folder / SPEC)
    written = spec.to_dict()
    for key, name in order.files.items():
        parent, last = _parent(written, key)
        _, function = _split(parent[last])
        parent[last] = f"{_kept(folder / name, spec.storage / UPLOADS)}{function}"
    return SweepSpec.from_dict(written)


def local_files(spec: SweepSpec) -> Iterator[tuple[str, Path]]:
    """(dotted key, path) of every file or folder of this machine that the spec names."""
    written = spec.to_dict()
    for keys in path_keys():
        value: Any = written
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            path = Path(_split(value)[0])
            if path.is_absolute() and path.exists():
                yield ".".join(keys), path


def _split(value: str) -> tuple[str, str]:
    """`FILE.py:name` -> (`FILE.py`, `:name`); anything else -> (it, "")."""
    path, colon, function = value.rpartition(":")
    return (path, f":{function}") if colon and path.endswith(".py") else (value, "")


def _parent(written: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    *way, last = dotted.split(".")
    for key in way:
        written = written[key]
    return written, last


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _kept(path: Path, uploads: Path) -> Path:
    """A copy under `uploads`, in a folder named by content; made once, whole or not at all."""
    hasher = hashlib.sha256()
    for file in _files(path):
        hasher.update(f"{file.relative_to(path.parent)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                hasher.update(block)
    place = uploads / hasher.hexdigest()[:16]
    if not place.exists():
        partial = uploads / f".{place.name}-{secrets.token_hex(4)}"
        partial.mkdir(parents=True)
        copy = partial / path.name
        shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
        try:
            partial.rename(place)
        except OSError:
            if not place.exists():
                raise
            shutil.rmtree(partial)  # another job brought the same meanwhile
    return place / path.name
