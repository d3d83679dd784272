"""One cache entry on disk: arrays as safetensors, a record as JSON with their sha256.

Written to a temporary folder and renamed, so a killed writer leaves nothing that looks whole; an entry that
does not check is treated as absent. Knows nothing of what it stores.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

FORMAT = 1
_ARRAYS = "pairs.safetensors"
_RECORD = "pairs.json"

_log = logging.getLogger(__name__)


def read_entry(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """(arrays, record), or None when there is no whole entry."""
    if not folder.is_dir():
        return None
    try:
        data = (folder / _ARRAYS).read_bytes()
        content = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["sha256"] != _sha256(data, content["record"]):
            raise ValueError("its hash does not match")
        return load(data), content["record"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        _log.warning("cache entry %s is not whole (%s: %s); it is made again", folder, type(error).__name__, error)
        return None


def write_entry(folder: Path, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """Atomic; a whole entry that another process wrote meanwhile is kept."""
    record = json.loads(json.dumps(record))  # as it will be read back: tuples are lists
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not mkdtemp: its folders are closed to the other users of a shared storage.
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        data = save(arrays)
        _write_synced(temporary / _ARRAYS, data)
        content = {"format": FORMAT, "sha256": _sha256(data, record), "record": record}
        _write_synced(temporary / _RECORD, json.dumps(content, ensure_ascii=True, indent=1).encode())
        _put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
        return
    except OSError:
        if read_entry(folder) is not None:
            return  # another process was faster, and its entry has the same content
    shutil.rmtree(folder, ignore_errors=True)  # torn
    os.rename(temporary, folder)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(data: bytes, record: dict[str, Any]) -> str:
    return hashlib.sha256(data + json.dumps(record, sort_keys=True).encode()).hexdigest()
