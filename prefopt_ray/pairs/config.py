"""What the pairs of a sweep are made from: sources, parts, text form and limits, as plain frozen data.

Knows nothing of YAML (the spec layer maps onto it), files or tokenizers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefopt_ray.errors import DataError, Problem

PART_NAMES = ("train", "select", "test")
MIN_MAX_TOKENS = 8  # a quarter for the prompt must still hold BOS and one token


@dataclass(frozen=True)
class SourceConfig:
    """Where rows come from: a hub dataset id, a local file or folder, or ready rows."""

    source: str  # hub id, path, or a name for `rows`
    split: str = "train"  # hub ids and folders only; a local file is one split
    data_dir: tuple[str, ...] = ()  # hub ids and folders: sub-folders, read in this order
    files: tuple[str, ...] = ()  # hub ids and folders: only these files, read in this order
    revision: str | None = None  # hub ids only
    columns: Mapping[str, str] = field(default_factory=dict)  # role (`shapes.COLUMN_KEYS`) -> column
    rows: tuple[Mapping[str, Any], ...] | None = None  # ready rows; nothing is read from disk


MODEST_PAIRS = 256  # with fewer the gain's own optimism, 1/(2n) nats, and its noise decide


@dataclass(frozen=True)
class PartConfig:
    """One part. `source=None` carves it out of train's source, by prompt."""

    source: SourceConfig | None
    pairs: int | None = None  # None = all; otherwise this many, chosen by prompt and seed
    most: float = 1.0  # but at most this share of the source's pairs: a default size must fit small files
    modest: float = 1.0  # and at most this share once it has MODEST_PAIRS: a part scored again and again costs time

    @property
    def sizes(self) -> tuple[int | None, float, float]:
        """What decides how many pairs it gets."""
        return self.pairs, self.most, self.modest


@dataclass(frozen=True)
class PairsConfig:
    """Everything that decides the token ids, beside the tokenizer. Raises DataError on impossible values."""

    train: PartConfig
    select: PartConfig
    test: PartConfig
    text: str = "template"  # template | plain | path of a FILE.jinja
    max_tokens: int = 1024  # prompt + the longer completion
    seed: int = 0  # decides which pairs a part with `pairs` gets

    def __post_init__(self) -> None:
        problems = []
        if self.train.source is None:
            problems.append(Problem("data", "train", "no source", "train cannot be carved out of itself"))
        if self.max_tokens < MIN_MAX_TOKENS:
            problems.append(Problem("data", "max_tokens", str(self.max_tokens), f"must be >= {MIN_MAX_TOKENS}"))
        for name, part in self.parts.items():
            if part.pairs is not None and part.pairs < 1:
                problems.append(Problem("data", f"{name}.pairs", str(part.pairs), "must be >= 1"))
            if part.source is None and part.pairs is None:
                problems.append(Problem("data", f"{name}.pairs", "nothing", "a part carved out of train needs `pairs`"))
        if problems:
            raise DataError(*problems)

    @property
    def parts(self) -> dict[str, PartConfig]:
        return {"train": self.train, "select": self.select, "test": self.test}

    def source_of(self, part: str) -> SourceConfig:
        source = self.parts[part].source or self.train.source
        assert source is not None  # checked on construction
        return source
