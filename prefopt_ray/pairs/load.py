"""`load_sweep_data`: from a PairsConfig and a tokenizer to SweepData, cached by content.

Joins sources, parts, texts and tokens; knows the rules for warnings and what the cache key is made of.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prefopt_ray.pairs.config import MODEST_PAIRS, PART_NAMES, PairsConfig, PartConfig
from prefopt_ray.pairs.encode import Encoder, tokenizer_fingerprint
from prefopt_ray.pairs.parts import FILL_ORDER, Drop, FilledPart, Pool, build_pool, fill_part
from prefopt_ray.pairs.rows import Source, open_source
from prefopt_ray.pairs.store import read_entry, write_entry
from prefopt_ray.pairs.texts import TurnEnd, open_text_form, template_text
from prefopt_ray.pairs.tokens import PairTokens, SweepData

RULES_VERSION = 1  # raise it whenever the same input would give other token ids, parts or drops
FEW_PAIRS = 1000  # below this a select or test part resolves only accuracy differences above .044


@dataclass(frozen=True)
class Truncation:
    """How much of one part was cut."""

    pairs: int
    prompts_cut: int
    completions_cut: int  # of 2 x pairs; these have no end-of-turn token


@dataclass(frozen=True)
class Origin:
    """Where a part came from, for records."""

    source: str
    split: str
    fingerprint: str  # sha256 of the source's content


@dataclass(frozen=True)
class LoadedPairs:
    """The three parts and all that a person should know about how they came about."""

    data: SweepData
    drops: tuple[Drop, ...]
    truncation: Mapping[str, Truncation]  # by part
    origins: Mapping[str, Origin]  # by part
    warnings: tuple[str, ...]
    max_token_id: int  # the engine refuses a model with a smaller vocabulary
    cached: bool = False  # read from the cache, nothing was tokenised


def load_sweep_data(
    config: PairsConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedPairs:
    """Read, pair, split, tokenise; or read all of it from `cache/<content hash>/`.

    `progress` is called with (pairs tokenised, pairs expected). Raises DataError.
    """
    sources = {part: open_source(config.source_of(part)) for part in _distinct_parts(config)}
    by_part = {part: sources[_first_with_same_source(config, part)] for part in PART_NAMES}
    key = _cache_key(config, tokenizer, by_part)
    if cache is not None:
        stored = read_entry(cache / key)
        if stored is not None:
            return _from_entry(*stored, origins=_origins(config, by_part))
    loaded = _load(config, tokenizer, by_part, progress=progress)
    if cache is not None:
        arrays, record = _to_entry(loaded)
        write_entry(cache / key, arrays, record)
    return loaded


def smallest_accuracy_difference(pairs: int) -> float:
    """The accuracy difference between two configurations that `pairs` pairs resolve at 95 %.

    1.96 x sqrt(2 x .25 / n): two independent accuracies near one half. Paired tests on the same pairs do better,
    by how much depends on how alike the configurations answer.
    """
    return 1.96 * math.sqrt(2 * 0.25 / pairs)


# --- reading and tokenising ------------------------------------------------------------------------


def _load(
    config: PairsConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Source],
    *,
    progress: Callable[[int, int], None] | None,
) -> LoadedPairs:
    form = open_text_form(config.text, tokenizer)  # first: a bad template is found before a long read
    encoder = Encoder(tokenizer, form, config.max_tokens)
    pools = _build_pools(config, sources)
    report = _Progress(progress, _expected_pairs(config, pools))
    taken: dict[str, str] = {}
    parts: dict[str, FilledPart] = {}
    for name in FILL_ORDER:
        parts[name] = fill_part(
            name, pools[name], encoder,
            pairs=_wanted(config.parts[name], pools[name]), seed=config.seed, taken=taken, on_pairs=report.advance,
        )
    report.finish()
    tokens = {name: parts[name].tokens() for name in PART_NAMES}
    truncation = {name: _count_cuts(parts[name]) for name in PART_NAMES}
    return LoadedPairs(
        data=SweepData(
            **tokens, pad_id=_pad_id(tokenizer), eos_ids=_eos_ids(tokenizer, form.end),
            digest=_digest(tokens, config.max_tokens),
        ),
        drops=_all_drops(pools, parts),
        truncation=truncation,
        origins=_origins(config, sources),
        warnings=(*form.warnings, *_warnings(config, parts, pools)),
        max_token_id=max(int(r.values.max()) for t in tokens.values() for r in (t.prompt, t.chosen, t.rejected)),
    )


def _wanted(part: PartConfig, pool: Pool) -> int | None:
    if part.pairs is None or (part.most, part.modest) == (1.0, 1.0):
        return part.pairs
    modest = max(MODEST_PAIRS, int(part.modest * len(pool.pairs)))
    return max(1, min(part.pairs, int(part.most * len(pool.pairs)), modest))


class _Progress:
    """Adds up and never shows more than expected, though dropped pairs are replaced by further ones."""

    def __init__(self, show: Callable[[int, int], None] | None, expected: int) -> None:
        self._show = show or (lambda done, expected: None)
        self._expected = expected
        self._done = 0

    def advance(self, pairs: int) -> None:
        self._done += pairs
        self._show(min(self._done, self._expected), self._expected)

    def finish(self) -> None:
        self._show(self._expected, self._expected)


def _distinct_parts(config: PairsConfig) -> list[str]:
    return [part for part in PART_NAMES if _first_with_same_source(config, part) == part]


def _first_with_same_source(config: PairsConfig, part: str) -> str:
    return next(name for name in PART_NAMES if config.source_of(name) == config.source_of(part))


def _build_pools(config: PairsConfig, sources: Mapping[str, Source]) -> dict[str, Pool]:
    """Parts with equal content and columns share one pool, also when it was named twice by different paths."""
    pools: dict[tuple[str, str], Pool] = {}
    by_part = {}
    for part in PART_NAMES:
        columns = dict(config.source_of(part).columns)
        identity = (sources[part].fingerprint, json.dumps(columns, sort_keys=True))
        if identity not in pools:
            pools[identity] = build_pool(sources[part].name, sources[part].read(), columns, part=part)
        by_part[part] = pools[identity]
    return by_part


def _origins(config: PairsConfig, sources: Mapping[str, Source]) -> dict[str, Origin]:
    configs = {name: config.source_of(name) for name in PART_NAMES}
    return {name: Origin(c.source, c.split, sources[name].fingerprint) for name, c in configs.items()}


def _expected_pairs(config: PairsConfig, pools: Mapping[str, Pool]) -> int:
    distinct = {id(pool): pool for pool in pools.values()}
    available = sum(len(pool.pairs) for pool in distinct.values())
    limits = [config.parts[name].pairs for name in PART_NAMES]
    return available if None in limits else min(available, sum(limit for limit in limits if limit is not None))


def _count_cuts(part: FilledPart) -> Truncation:
    return Truncation(
        pairs=len(part.encoded),
        prompts_cut=sum(e.prompt_cut for e in part.encoded),
        completions_cut=sum(e.completions_cut for e in part.encoded),
    )


def _all_drops(pools: Mapping[str, Pool], parts: Mapping[str, FilledPart]) -> tuple[Drop, ...]:
    from_rows = [drop for pool in {id(p): p for p in pools.values()}.values() for drop in pool.drops]
    from_parts = [drop for part in parts.values() for drop in part.drops]
    return tuple(sorted(from_rows + from_parts, key=lambda d: (PART_NAMES.index(d.part), d.row)))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Masks come from lengths, so any valid id serves; models without a pad token are not refused."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _eos_ids(tokenizer: PreTrainedTokenizerBase, end: TurnEnd) -> tuple[int, ...]:
    """The end of a turn first, then the tokenizer's own end of text if it is another token."""
    return tuple(dict.fromkeys(t for t in (end.token, tokenizer.eos_token_id) if t is not None))


def _digest(parts: Mapping[str, PairTokens], max_tokens: int) -> str:
    digest = hashlib.sha256(f"max_tokens={max_tokens}".encode())
    for name, tokens in parts.items():
        for field_name, array in tokens.arrays().items():
            digest.update(f"{name}.{field_name}:{array.dtype}:{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


# --- warnings --------------------------------------------------------------------------------------


def _warnings(config: PairsConfig, parts: Mapping[str, FilledPart], pools: Mapping[str, Pool]) -> list[str]:
    encoded = [pair for part in parts.values() for pair in part.encoded]
    warnings = [text for name in PART_NAMES for text in _part_warnings(name, _wanted(config.parts[name], pools[name]), parts[name])]
    malformed = sum(1 for drop in _all_drops(pools, parts) if drop.detail)
    if malformed:
        warnings.append(f"malformed rows dropped: {malformed}")
    merges = sum(pair.merges_at_border for pair in encoded)
    if merges:
        warnings.append(
            f"in {merges} of {len(encoded)} pairs the tokenizer would merge characters across the border between "
            "prompt and completion; they are tokenised apart, as when the model generates"
        )
    scores = [pair.pair.scores for pair in encoded if pair.pair.scores is not None]
    reversed_scores = sum(chosen < rejected for chosen, rejected in scores)
    if reversed_scores > len(scores) // 2:
        warnings.append(
            f"in {reversed_scores} of {len(scores)} pairs the rejected answer has the higher score; "
            "are `chosen_score` and `rejected_score` the right way round?"
        )
    together = sum(pair.runs_together for pair in encoded)
    if config.text == "plain" and together > len(encoded) // 2:
        warnings.append(
            f"in {together} of {len(encoded)} pairs the completion follows the prompt without a space or line break; "
            "plain text is used as it is"
        )
    return warnings


def _part_warnings(name: str, asked: int | None, part: FilledPart) -> list[str]:
    pairs = len(part.encoded)
    warnings = []
    if asked is not None and pairs < asked:
        warnings.append(f"{name}: {asked} pairs were asked for, {pairs} are left")
    prompts = len({e.pair.group for e in part.encoded})  # pairs of one prompt are not independent
    if name != "train" and prompts < FEW_PAIRS:
        smallest = smallest_accuracy_difference(prompts)
        few = f"{pairs} pairs" if prompts == pairs else f"{pairs} pairs on {prompts} prompts"
        warnings.append(f"{name}: {few} cannot resolve accuracy differences below {smallest:.3f} (95 %)")
    cut = sum(e.completions_cut for e in part.encoded)
    if cut:
        lost = f"{cut} of {2 * pairs} completions lost their end at max_tokens"
        warnings.append(f"{name}: {lost}, and with it the end of turn")
    return warnings


# --- cache -----------------------------------------------------------------------------------------


def _cache_key(config: PairsConfig, tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, Source]) -> str:
    """Over content only: not over paths, names, times or library versions."""
    parts = {
        name: [sources[name].fingerprint, sorted(config.source_of(name).columns.items()), *config.parts[name].sizes]
        for name in PART_NAMES
    }
    text = "plain" if config.text == "plain" else template_text(config.text, tokenizer)
    content = [
        RULES_VERSION, parts, config.text == "plain", text, config.max_tokens, config.seed,
        tokenizer_fingerprint(tokenizer), tokenizer.pad_token_id,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _to_entry(loaded: LoadedPairs) -> tuple[dict, dict]:
    parts = loaded.data.parts
    arrays = {f"{part}.{name}": array for part, tokens in parts.items() for name, array in tokens.arrays().items()}
    record = {
        "pad_id": loaded.data.pad_id,
        "eos_ids": loaded.data.eos_ids,
        "digest": loaded.data.digest,
        "drops": [[d.part, d.row, d.reason, d.place, d.detail] for d in loaded.drops],
        "truncation": {part: [t.pairs, t.prompts_cut, t.completions_cut] for part, t in loaded.truncation.items()},
        "warnings": loaded.warnings,
        "max_token_id": loaded.max_token_id,
    }
    return arrays, record


def _from_entry(arrays: dict, record: dict, *, origins: Mapping[str, Origin]) -> LoadedPairs:
    def tokens(part: str) -> PairTokens:
        start = f"{part}."
        return PairTokens.from_arrays({k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)})

    parts = {part: tokens(part) for part in PART_NAMES}
    return LoadedPairs(
        data=SweepData(**parts, pad_id=record["pad_id"], eos_ids=tuple(record["eos_ids"]), digest=record["digest"]),
        drops=tuple(Drop(*drop) for drop in record["drops"]),
        truncation={part: Truncation(*counts) for part, counts in record["truncation"].items()},
        origins=origins,
        warnings=tuple(record["warnings"]),
        max_token_id=record["max_token_id"],
        cached=True,
    )
