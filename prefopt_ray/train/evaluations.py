"""Per-pair evaluations of one trial: every verdict, interval and later question is answered from these.

One safetensors file per trial. For each part (`select`, `probe`, and `test` once at the end):
`<part>/row_ids` (N,) int64 · `<part>/groups` (N,) int64 · `<part>/tokens` (N, 2) int32 ·
`<part>/reference` (N, 2) float32 · `<part>/policy/<step>` (N, 2) float32 for every evaluation.
Columns are chosen, rejected; log-probs are sums over completion tokens in nats, so a pair's
log-ratio is policy - reference and h = (chosen log-ratio) - (rejected log-ratio).
`probe/loss_norm/<step>` (1,) float64: the probe's loss over the loss at the start.
Where samples were drawn, one of each of M prompts, <step> as above or `reference`:
`samples/kl/<step>` (M,) float64 nats · `samples/positions/<step>` (M,) int64 · `samples/finished/<step>` (M,) bool ·
`samples/unique_frac/<step>` (1,) float64 · `samples/<scorer>/policy/<step>` and `samples/<scorer>/reference` (M,).
Of every optimizer step: `steps/step` (S,) int64 · `steps/loss|loss_norm|grad_norm` (S,) float64 ·
`steps/finite` (S,) bool. Of the trial: `trial/vocabulary` and `trial/train_pairs` (1,) int64.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefopt_ray.engine.base import ReferencedPairs
from prefopt_ray.errors import CheckpointError
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.measures.verdicts import StepRecord

_STEP_COLUMNS = {"step": np.int64, "loss": np.float64, "loss_norm": np.float64, "grad_norm": np.float64, "finite": bool}


class EvaluationLog:
    """Everything a trial's evaluations saw, in memory; `save` writes the file anew and renames it."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)

    @classmethod
    def of_parts(cls, parts: Mapping[str, ReferencedPairs]) -> "EvaluationLog":
        arrays = {}
        for name, part in parts.items():
            tokens = part.tokens
            arrays[f"{name}/row_ids"], arrays[f"{name}/groups"] = tokens.row_ids, tokens.groups
            lengths = np.stack([tokens.chosen.lengths, tokens.rejected.lengths], axis=1)
            arrays[f"{name}/tokens"] = lengths.astype(np.int32)
            arrays[f"{name}/reference"] = part.reference
        return cls(arrays)

    @classmethod
    def load(cls, path: Path) -> "EvaluationLog":
        """Raises CheckpointError when the file is missing or torn."""
        try:
            return cls(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: missing or torn ({error})") from error

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".tmp")
        save_file({name: np.ascontiguousarray(array) for name, array in self._arrays.items()}, partial)
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)

    def add(self, part: str, step: int, policy: np.ndarray) -> None:
        """`policy` (N, 2) float32: log-probs of chosen and rejected at `step`."""
        self._arrays[_key(part, step)] = policy

    def put(self, name: str, values: np.ndarray | float | int) -> None:
        """Anything else that the module lists; a number becomes an array of one."""
        self._arrays[name] = np.atleast_1d(values)

    def get(self, name: str) -> np.ndarray | None:
        return self._arrays.get(name)

    def number(self, name: str) -> float | None:
        """What `put` was given as one number."""
        values = self._arrays.get(name)
        return None if values is None else values[0].item()

    def names(self) -> list[str]:
        return sorted(self._arrays)

    def put_steps(self, steps: Sequence[StepRecord]) -> None:
        """All optimizer steps so far, in place of what was there."""
        for column, dtype in _STEP_COLUMNS.items():
            self._arrays[f"steps/{column}"] = np.array([getattr(record, column) for record in steps], dtype=dtype)

    def step_records(self) -> list[StepRecord]:
        """Empty for a log that has none, as the test part's."""
        if "steps/step" not in self._arrays:
            return []
        columns = (self._arrays[f"steps/{column}"].tolist() for column in _STEP_COLUMNS)
        return [StepRecord(*values) for values in zip(*columns, strict=True)]

    def steps(self, part: str) -> list[int]:
        prefix = f"{part}/policy/"
        return sorted(int(name.removeprefix(prefix)) for name in self._arrays if name.startswith(prefix))

    def forget_after(self, step: int) -> None:
        """Drop evaluations later than a checkpoint that a trial is resumed from."""
        for name in list(self._arrays):
            if (found := _EVALUATED_AT.search(name)) and int(found[1]) > step:
                del self._arrays[name]

    def groups(self, part: str) -> np.ndarray:
        return self._arrays[f"{part}/groups"]

    def row_ids(self, part: str) -> np.ndarray:
        return self._arrays[f"{part}/row_ids"]

    def stats(self, part: str, step: int) -> PairStats:
        """(N,) statistics of an evaluation, in pair order."""
        policy = torch.from_numpy(np.array(self._arrays[_key(part, step)]))
        reference = torch.from_numpy(np.array(self._arrays[f"{part}/reference"]))
        tokens = torch.from_numpy(np.array(self._arrays[f"{part}/tokens"], dtype=np.int64))
        return PairStats(
            row_ids=torch.from_numpy(np.array(self.row_ids(part))),
            policy_chosen=policy[:, 0], policy_rejected=policy[:, 1],
            reference_chosen=reference[:, 0], reference_rejected=reference[:, 1],
            chosen_tokens=tokens[:, 0], rejected_tokens=tokens[:, 1],
        )


_EVALUATED_AT = re.compile(r"/(\d{8,})$")


def _key(part: str, step: int) -> str:
    return f"{part}/policy/{step:08d}"
