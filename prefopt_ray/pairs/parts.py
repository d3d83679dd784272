"""Three parts, disjoint by first human turn, out of one to three sources.

Parts are filled in the order test, select, train: a prompt that test holds is kept out of the others. Which
prompts a part with `pairs: N` gets depends on (seed, part, prompt) only, so N = 1000 is a subset of N = 2000
and adding rows to a file moves no other row. Knows no files and no templates.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.pairs.encode import EncodedPair, Encoder
from prefopt_ray.pairs.rows import MAX_PROBLEMS, Row
from prefopt_ray.pairs.shapes import DropReason, Pair, RowDropped, find_columns, read_pair
from prefopt_ray.pairs.tokens import PairTokens, Ragged

FILL_ORDER = ("test", "select", "train")
TOLERATED_MALFORMED = 0.01  # more than this share of malformed rows is a wrong file, not a stray row
_BATCH = 256  # pairs per tokenizer call: large enough for its threads, small enough for a smooth progress bar
_ALSO_IN = {"select": DropReason.ALSO_IN_SELECT, "test": DropReason.ALSO_IN_TEST}


@dataclass(frozen=True)
class Drop:
    """A row that is in no part. `row` counts from 0 in its source; `place` is file and line for people."""

    part: str  # whose source the row is in: train also for rows that a carved part looked at
    row: int
    reason: str  # a DropReason
    place: str
    detail: str = ""  # what a malformed row holds


@dataclass
class Pool:
    """The pairs of one source; parts that share the source draw from it in turn."""

    name: str
    part: str  # the first part that reads it; its drops are booked there, once
    rows: int
    pairs: list[Pair]
    drops: list[Drop]
    spent: set[int] = field(default_factory=set)  # row numbers in a part, or dropped


@dataclass(frozen=True)
class FilledPart:
    """One part after tokenising, in row order."""

    encoded: list[EncodedPair]
    drops: list[Drop]

    def tokens(self) -> PairTokens:
        return PairTokens(
            row_ids=np.asarray([e.pair.number for e in self.encoded], dtype=np.int64),
            groups=np.asarray([group_id(e.pair.group) for e in self.encoded], dtype=np.int64),
            prompt=Ragged.from_lists([e.prompt for e in self.encoded]),
            chosen=Ragged.from_lists([e.chosen for e in self.encoded]),
            rejected=Ragged.from_lists([e.rejected for e in self.encoded]),
            scores=_scores([e.pair for e in self.encoded]),
        )


def build_pool(name: str, rows: Sequence[Row], overrides: dict[str, str], *, part: str) -> Pool:
    """Read every row once; drops are booked under `part`. Raises DataError for columns, or too many malformed rows."""
    columns = find_columns(rows, overrides, name)
    pool = Pool(name, part, len(rows), [], [])
    problems: list[Problem] = []
    for row in rows:
        try:
            pool.pairs.append(read_pair(row, columns))
        except RowDropped as dropped:
            pool.drops.append(_drop(part, row.number, row.place, dropped))
            problems += [dropped.problem] if dropped.problem else []
    refuse_malformed(problems, len(rows))
    if not pool.pairs:
        raise DataError(nothing_left(name, len(rows), pool.drops))
    return pool


def fill_part(
    part: str,
    pool: Pool,
    encoder: Encoder,
    *,
    pairs: int | None,
    seed: int,
    taken: dict[str, str],
    on_pairs: Callable[[int], None],
) -> FilledPart:
    """Take `pairs` pairs (None: all) whose prompt is not in `taken` (prompt group -> part), and tokenise them.

    Marks what it used in `pool.spent` and adds its groups to `taken`. Raises DataError when nothing remains or
    the template refuses too many rows.
    """
    drops: list[Drop] = []
    candidates: list[Pair] = []
    for pair in pool.pairs:
        if pair.number in pool.spent:
            continue
        owner = taken.get(pair.group)
        if owner is None:
            candidates.append(pair)
        else:
            pool.spent.add(pair.number)
            drops.append(Drop(pool.part, pair.number, _ALSO_IN[owner], pair.place))
    if pairs is not None:
        candidates.sort(key=lambda pair: (_draw(seed, part, pair.group), pair.number))
    encoded = _encode_until(pool, encoder, candidates, wanted=pairs, drops=drops, on_pairs=on_pairs)
    if not encoded:
        raise DataError(_part_is_empty(part, pool, drops, taken))
    encoded.sort(key=lambda e: e.pair.number)
    taken.update((e.pair.group, part) for e in encoded)
    return FilledPart(encoded, drops)


def group_id(group: str) -> int:
    """A first human turn as int64; equal across parts and files."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big", signed=True)


def _scores(pairs: Sequence[Pair]) -> np.ndarray | None:
    """(N, 2) float32; None where the source's columns name no scores: all pairs of a part have them, or none has."""
    scored = [pair.scores for pair in pairs if pair.scores is not None]
    return np.asarray(scored, dtype=np.float32) if scored else None


def refuse_malformed(problems: Sequence[Problem], rows: int) -> None:
    """A stray bad row in a hundred is dropped and counted; more of them mean that the file is not what it should be."""
    if len(problems) <= TOLERATED_MALFORMED * rows:
        return
    shown = list(problems[:MAX_PROBLEMS])
    if len(problems) > len(shown):
        more = len(problems) - len(shown)
        shown.append(Problem(shown[-1].place, "", "", f"and {more} more malformed rows after it, of {rows}"))
    raise DataError(*shown)


def nothing_left(name: str, rows: int, drops: Sequence[Drop]) -> Problem:
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(d.reason for d in drops).most_common())
    return Problem(name, "", f"{rows} rows: {counts}", "no usable pair remains", _fix_for(drops))


def _fix_for(drops: Sequence[Drop]) -> str:
    reasons = Counter(drop.reason for drop in drops)
    if reasons[DropReason.DIFFERING_PROMPTS]:
        return "chosen and rejected must answer the same prompt; if the prompt column is another text than the " \
               "conversations begin with, say `columns: {prompt: chosen}`"
    if reasons[DropReason.IDENTICAL_AFTER_CUT]:
        return "raise max_tokens"
    if reasons[DropReason.END_INSIDE]:
        return "the texts hold the template's own marks; use texts without them, or `text: plain`"
    return "are these the right columns? name them: `columns: {prompt: NAME, chosen: NAME, rejected: NAME}`"


def _draw(seed: int, part: str, group: str) -> bytes:
    """A place in the queue; a hash, so that it depends on nothing else in the file and on no library's generator."""
    return hashlib.blake2b(f"{seed}:{part}:{group}".encode(), digest_size=16).digest()


def _encode_until(
    pool: Pool,
    encoder: Encoder,
    candidates: Sequence[Pair],
    *,
    wanted: int | None,
    drops: list[Drop],
    on_pairs: Callable[[int], None],
) -> list[EncodedPair]:
    """Tokenise in order until `wanted` pairs survived; each loss is replaced by the next candidate."""
    kept: list[EncodedPair] = []
    problems: list[Problem] = []
    position = 0
    while position < len(candidates) and (wanted is None or len(kept) < wanted):
        size = _BATCH if wanted is None else min(_BATCH, wanted - len(kept))
        batch = candidates[position : position + size]
        position += len(batch)
        for pair, result in zip(batch, encoder.encode(batch)):
            pool.spent.add(pair.number)
            if isinstance(result, RowDropped):
                drops.append(_drop(pool.part, pair.number, pair.place, result))
                problems += [result.problem] if result.problem else []
            else:
                kept.append(result)
        on_pairs(len(batch))
    refuse_malformed(problems, position)
    return kept


def _drop(part: str, number: int, place: str, dropped: RowDropped) -> Drop:
    return Drop(part, number, dropped.reason, place, str(dropped.problem) if dropped.problem else "")


def _part_is_empty(part: str, pool: Pool, drops: Sequence[Drop], taken: dict[str, str]) -> Problem:
    owners = Counter(taken.values())
    if not owners:
        return nothing_left(pool.name, pool.rows, [*pool.drops, *drops])
    held = ", ".join(f"{owner} holds {count} prompts" for owner, count in owners.items())
    smaller = " and ".join(f"data.{owner}.pairs" for owner in owners)
    found = f"{len(pool.pairs)} usable pairs; {held}"
    fix = f"lower {smaller}, or name another source"
    return Problem(pool.name, f"data.{part}", found, "no prompt is left for this part", fix)
