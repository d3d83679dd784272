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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefopt_ray.engine.base import REFERENCE, WHOLE, Engine, ReferencedPairs, Share
from prefopt_ray.engine.extras import DERIVED
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
    layout: str  # how tokens lie and how many in one forward: rounding depends on it

    def digest(self, pairs: PairTokens) -> str:
        hasher = hashlib.sha256(json.dumps([*vars(self).values()]).encode())
        arrays = replace(pairs, scores=None).arrays()  # what a completion is worth changes no log-prob
        for name, array in sorted(arrays.items()):
            hasher.update(f"{name}{array.dtype}{array.shape}".encode())
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()[:32]


def reference_parts(
    engine: Engine,
    data: SweepData,
    key: ReferenceKey,
    *,
    cache: Path | None,
    needs: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> dict[str, ReferencedPairs]:
    """train, select and test with their reference log-probs, from the cache or by one pass each.

    `needs` are those of the losses that will train: what they take of the reference beside the pairs themselves is
    scored with them. Raises ModelError for log-probs that are not finite.
    """
    missing = missing_passes(data, key, cache=cache, needs=needs)
    made = score_passes(engine, missing, progress=progress)
    return keep_reference(data, key, [made], cache=cache, needs=needs)


def missing_passes(
    data: SweepData, key: ReferenceKey, *, cache: Path | None, needs: frozenset[str] = frozenset()
) -> dict[str, PairTokens]:
    """Of all passes those that are not in the cache, sound and complete."""
    passes = reference_passes(data, needs)
    stored = _stored(passes, key, cache=cache)
    return {name: pairs for name, pairs in passes.items() if name not in stored}


def score_passes(
    engine: Engine, passes: Mapping[str, PairTokens], *, share: Share = WHOLE, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """(N, 2) by pass; of a share the other shares' pairs are 0. `progress` counts this share's pairs of all."""
    total, done = sum(len(pairs) for pairs in passes.values()), 0

    def advance(pairs: int) -> None:
        nonlocal done
        done += pairs
        if progress:
            progress(done, total)

    return {name: engine.score(REFERENCE, pairs, advance=advance, share=share) for name, pairs in passes.items()}


def keep_reference(
    data: SweepData, key: ReferenceKey, shares: Sequence[Mapping[str, np.ndarray]], *,
    cache: Path | None, needs: frozenset[str] = frozenset(),
) -> dict[str, ReferencedPairs]:
    """The parts with what all shares together scored, put into the cache, and with what was there.

    Raises ModelError for log-probs that are not finite.
    """
    passes = reference_passes(data, needs)
    scored = _stored({name: pairs for name, pairs in passes.items() if name not in shares[0]}, key, cache=cache)
    for name in shares[0]:
        logps, pairs = sum(share[name] for share in shares), passes[name]
        _require_finite(logps, pairs, part_name=name)
        if cache:
            _write(_path(cache, key, pairs), pairs, logps)
        scored[name] = ReferencedPairs(pairs, logps)
    return _joined_parts(data, scored, needs)


def reference_passes(data: SweepData, needs: frozenset[str]) -> dict[str, PairTokens]:
    """Every set of pairs to score: the parts, and `train <need>` for what is derived from the train part."""
    derived = {f"train {need}": derive(data.train) for need, derive in DERIVED.items() if need in needs}
    return data.parts | derived


def _stored(passes: dict[str, PairTokens], key: ReferenceKey, *, cache: Path | None) -> dict[str, ReferencedPairs]:
    out = {}
    for name, pairs in passes.items():
        path = _path(cache, key, pairs) if cache else None
        logps = _read(path, pairs) if path and path.is_file() else None
        if logps is not None:
            out[name] = ReferencedPairs(pairs, logps)
    return out


def _joined_parts(
    data: SweepData, scored: dict[str, ReferencedPairs], needs: frozenset[str]
) -> dict[str, ReferencedPairs]:
    derived = {need: scored[f"train {need}"] for need in DERIVED if need in needs}
    return {
        name: replace(scored[name], derived=derived) if name == "train" else scored[name] for name in data.parts
    }


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
