"""The reference store: reference log-probs computed once per content and shared by every trial and sweep.

Keyed by what the numbers depend on (weights, reference choice, token ids, dtype, attention, how rows
are grouped) and never by loss, beta, learning rate, rank or seed. Joined by row id, checked for
completeness and finiteness when read.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefopt_ray.engine.base import REFERENCE, Engine, ReferencedPairs
from prefopt_ray.engine.plain import SCORING_TOKENS
from prefopt_ray.errors import ModelError, Problem
from prefopt_ray.pairs.tokens import PairTokens, SweepData

Progress = Callable[[int, int], None]  # (pairs done, pairs in all)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceKey:
    """Everything the reference log-probs depend on, beside the token ids of a part."""

    weights: str  # digest of the reference's weights, adapters included
    dtype: str
    attention: str
    device: str  # kind of device: kernels differ

    def digest(self, pairs: PairTokens) -> str:
        hasher = hashlib.sha256(json.dumps([*vars(self).values(), SCORING_TOKENS]).encode())
        for name, array in sorted(pairs.arrays().items()):
            hasher.update(f"{name}{array.dtype}{array.shape}".encode())
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()[:32]


def reference_parts(
    engine: Engine, data: SweepData, key: ReferenceKey, *, cache: Path | None, progress: Progress | None = None
) -> dict[str, ReferencedPairs]:
    """train, select and test with their reference log-probs, from the cache or by one pass each."""
    known = stored_parts(data, key, cache=cache)
    total = sum(len(part) for part in data.parts.values())
    done = sum(len(part) for part in known.values())

    def advance(pairs: int) -> None:
        nonlocal done
        done += pairs
        if progress:
            progress(done, total)

    for name, part in data.parts.items():
        if name not in known:
            logps = engine.score(REFERENCE, part, advance=advance)
            _require_finite(logps, part, part_name=name)
            if cache:
                _write(_path(cache, key, part), part, logps)
            known[name] = ReferencedPairs(part, logps)
    return known


def stored_parts(data: SweepData, key: ReferenceKey, *, cache: Path | None) -> dict[str, ReferencedPairs]:
    """The parts whose reference log-probs are in the cache, sound and complete."""
    out = {}
    for name, part in data.parts.items():
        path = _path(cache, key, part) if cache else None
        logps = _read(path, part) if path and path.is_file() else None
        if logps is not None:
            out[name] = ReferencedPairs(part, logps)
    return out


def _path(cache: Path, key: ReferenceKey, part: PairTokens) -> Path:
    return cache / f"{key.digest(part)}.safetensors"


def _read(path: Path, part: PairTokens) -> np.ndarray | None:
    """(N, 2) joined by row id, or None when the file is damaged or holds other rows (it is then rewritten)."""
    try:
        return _joined(load_file(path), part)
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("%s is not usable (%s); the reference pass is made again", path, error)
        return None


def _joined(stored: dict[str, np.ndarray], part: PairTokens) -> np.ndarray:
    """(N, 2) in the part's order. Raises ValueError unless the rows are exactly the part's and all finite."""
    if stored.keys() != {"row_ids", "logps"} or stored["logps"].shape != (len(part), 2):
        raise ValueError(f"it should hold row_ids and logps of {len(part)} pairs")
    order = np.argsort(stored["row_ids"], kind="stable")
    index = order[np.searchsorted(stored["row_ids"][order], part.row_ids).clip(max=len(part) - 1)]
    if not np.array_equal(stored["row_ids"][index], part.row_ids):
        raise ValueError("its row ids are not those of the pairs")
    logps = stored["logps"][index]
    if not np.isfinite(logps).all():
        raise ValueError("it holds values that are not finite")
    return logps


def _write(path: Path, part: PairTokens, logps: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    save_file({"row_ids": part.row_ids, "logps": logps}, name)
    os.replace(name, path)


def _require_finite(logps: np.ndarray, part: PairTokens, *, part_name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
    if len(bad):
        rows = ", ".join(str(int(part.row_ids[i])) for i in bad[:5])
        raise ModelError(Problem(
            place=f"{part_name} part", key="model.reference",
            found=f"{len(bad)} pairs without a finite log-probability (rows {rows})",
            rule="the reference must give every completion a finite log-probability",
            fix="check that the model fits its tokenizer; with float16 weights use dtype bfloat16 or float32",
        ))
