"""Checkpoints of one trial: safetensors and JSON with a manifest of hashes, written aside and renamed.

Kept: the best and the last two. A torn or altered checkpoint is noticed by its hashes and the one
before it is used. Nothing is unpickled.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt_ray.errors import CheckpointError

FORMAT = 1
KEPT_LAST = 2
LOCK_WAIT_S = 30.0  # orphaned workers of a local Ray end within ten seconds
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"

log = logging.getLogger(__name__)


def lock_folder(folder: Path, *, wait_s: float = LOCK_WAIT_S) -> TextIO:
    """Keep other processes out of a trial's folder while the returned file is open, or this process lives.

    A driver killed a moment ago may have left a worker that is still stepping: it is waited for. Raises
    CheckpointError when it does not go away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise CheckpointError(f"{folder}: another process is training this trial") from error
            time.sleep(0.1)
        else:
            return file


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoint folder of one trial."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint, *, keep: Collection[int]) -> None:
        """Write one checkpoint durably, then remove others than the last two and the steps to `keep`."""
        final = self._path(checkpoint.step)
        partial = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        for left_over in self.folder.glob(".step-*.tmp"):  # of a process that was killed while writing
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)
        save_file(checkpoint.tensors, partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps(checkpoint.state))
        hashes = {name: _sha256(partial / name) for name in (_TENSORS, _STATE)}
        (partial / _MANIFEST).write_text(json.dumps({"format": FORMAT, "step": checkpoint.step, "sha256": hashes}))
        for name in (_TENSORS, _STATE, _MANIFEST):
            _fsync(partial / name)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _fsync(self.folder)
        # Later ones could not be read when the trial was continued; they must not push sound ones out.
        sound = [step for step in self.steps() if step <= checkpoint.step]
        self.prune({*keep, *sound[-KEPT_LAST:]})

    def prune(self, keep: Collection[int]) -> None:
        """Remove all but the steps to `keep`."""
        for step in self.steps():
            if step not in keep:
                shutil.rmtree(self._path(step))

    def steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*"))

    def load(self, step: int) -> Checkpoint:
        """Raises CheckpointError when a file is missing or does not match its hash."""
        path = self._path(step)
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            for name, expected in manifest["sha256"].items():
                if _sha256(path / name) != expected:
                    raise CheckpointError(f"{path / name}: does not match its sha256 in {_MANIFEST}")
            if manifest["format"] != FORMAT:
                raise CheckpointError(f"{path}: written in format {manifest['format']}, this version reads {FORMAT}")
            state = json.loads((path / _STATE).read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: torn or unreadable ({error})") from error
        return Checkpoint(step, load_file(path / _TENSORS), state)

    def latest(self) -> Checkpoint | None:
        """The newest sound checkpoint; unsound ones are named in the log and skipped."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except CheckpointError as error:
                log.warning("%s; using the checkpoint before it", error)
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
