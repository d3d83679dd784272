"""Scores beside the answers: read where they are named, kept with their pair, refused when they are no number."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.engine.reference import ReferenceKey
from prefopt_ray.errors import DataError
from prefopt_ray.pairs.config import PairsConfig, PartConfig, SourceConfig
from prefopt_ray.pairs.load import LoadedPairs, load_sweep_data
from prefopt_ray.pairs.rows import Row
from prefopt_ray.pairs.shapes import DropReason, RowDropped, find_columns, read_pair
from prefopt_ray.pairs.show import render_pairs, show_pairs
from prefopt_ray.pairs.tokens import PairTokens

NAMED = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}
COUNT = 40


def rows(**changes: object) -> list[dict]:
    return [
        {"prompt": f"p{i} ?", "chosen": f" good {i}", "rejected": f" bad {i}", "score_chosen": 8 + i / 10,
         "score_rejected": i % 3, **changes} for i in range(COUNT)
    ]


def load(tokenizer, source: SourceConfig | list[dict], *, cache: Path | None = None,
         columns: dict[str, str] | None = None) -> LoadedPairs:
    if isinstance(source, list):
        source = SourceConfig("rows", columns=NAMED if columns is None else columns, rows=tuple(source))
    config = PairsConfig(PartConfig(source), PartConfig(None, 10), PartConfig(None, 10), text="plain", max_tokens=64)
    return load_sweep_data(config, tokenizer, cache=cache)


def expected(part: PairTokens) -> np.ndarray:
    return np.array([[8 + row / 10, row % 3] for row in part.row_ids], dtype=np.float32)


def read_score(value: object) -> float:
    row = Row(7, "rows.jsonl:8", {"prompt": "p", "chosen": "a", "rejected": "b", "s": value, "t": 0})
    columns = find_columns([row], {"chosen_score": "s", "rejected_score": "t"}, "rows.jsonl")
    return read_pair(row, columns).scores[0]


def test_named_scores_stay_with_their_pair_through_parts_and_cache(make_tokenizer, tmp_path):
    for _ in ("tokenised", "from the cache"):
        loaded = load(make_tokenizer(), rows(), cache=tmp_path)
        for part in loaded.data.parts.values():
            assert part.scores.dtype == np.float32
            assert np.array_equal(part.scores, expected(part))
            order = np.arange(len(part))[::-3]
            assert np.array_equal(part.take(order).scores, expected(part)[order])
    assert loaded.cached


def test_scores_that_nobody_names_are_not_read_however_broken(make_tokenizer):
    loaded = load(make_tokenizer(), rows(score_chosen=None), columns={})
    assert all(part.scores is None and "scores" not in part.arrays() for part in loaded.data.parts.values())
    assert loaded.drops == ()


def test_other_scores_are_other_data_with_the_same_reference(make_tokenizer):
    key = ReferenceKey("w", "float32", "sdpa", "cpu", "rows")
    with_scores, others, without = (
        load(make_tokenizer(), rows()), load(make_tokenizer(), rows(score_chosen=9.5)),
        load(make_tokenizer(), rows(), columns={}),
    )
    assert len({loaded.data.digest for loaded in (with_scores, others, without)}) == 3
    assert len({key.digest(loaded.data.train) for loaded in (with_scores, others, without)}) == 1


def test_a_csv_file_has_its_scores_as_text(make_tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows()[0]))
        writer.writeheader()
        writer.writerows(rows())
    loaded = load(make_tokenizer(), SourceConfig(str(path), columns=NAMED))
    assert np.array_equal(loaded.data.train.scores, expected(loaded.data.train))


@given(st.one_of(st.integers(-(10**9), 10**9), st.floats(-1e30, 1e30)))
def test_a_number_is_the_same_score_as_its_text(value):
    assert read_score(value) == read_score(repr(value)) == value


@pytest.mark.parametrize("value", [
    None, True, "good", "", "nan", "inf", "1_000", "٣", [8], {"value": 8}, math.nan, math.inf, -math.inf, 1e39,
    "1e39", 10**400,
])
def test_what_is_no_finite_number_is_malformed_and_named(value):
    with pytest.raises(RowDropped) as dropped:
        read_score(value)
    assert dropped.value.reason == DropReason.MALFORMED
    said = str(dropped.value.problem)
    assert said.startswith("rows.jsonl:8 s: got ") and "score must be" in said


def test_a_file_with_bad_scores_is_refused_with_row_and_column(make_tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    values = rows()
    values[4]["score_rejected"] = math.nan
    path.write_text("\n".join(map(json.dumps, values)))
    with pytest.raises(DataError, match=r"a\.jsonl:5 score_rejected: got a number \(nan\); a score must be finite"):
        load(make_tokenizer(), SourceConfig(str(path), columns=NAMED))


@pytest.mark.parametrize(("columns", "says"), [
    ({"chosen_score": "score_chosen"}, "columns.rejected_score: .*both answers need a score"),
    ({**NAMED, "rejected_score": "score_rejecte"}, "did you mean 'score_rejected'?"),
    ({"score_chosen": "score_chosen"}, "columns.score_chosen: .*must be one of prompt, chosen"),
])
def test_half_named_or_misspelt_scores_are_refused(make_tokenizer, columns, says):
    with pytest.raises(DataError, match=says):
        load(make_tokenizer(), rows(), columns=columns)


def test_scores_the_wrong_way_round_are_warned_about_and_equal_ones_are_not(make_tokenizer):
    turned = {"chosen_score": "score_rejected", "rejected_score": "score_chosen"}
    swapped = load(make_tokenizer(), rows(), columns=turned)
    assert any("40 of 40 pairs the rejected answer has the higher score" in text for text in swapped.warnings)
    for fine in (rows(), rows(score_chosen=2, score_rejected=2)):
        assert not any("higher score" in text for text in load(make_tokenizer(), fine).warnings)


def test_shown_pairs_show_their_scores(make_tokenizer):
    tokenizer = make_tokenizer()
    loaded = load(tokenizer, rows())
    view = show_pairs(loaded, tokenizer, 1)[0]
    assert (view.chosen_score, view.rejected_score) == tuple(expected(loaded.data.train)[0].tolist())
    text = render_pairs([replace(view, chosen_score=8.5)], loaded).renderables[0].plain
    assert "[chosen, score 8.5]" in text
    without = load(tokenizer, rows(), columns={})
    assert "[chosen] " in render_pairs(show_pairs(without, tokenizer, 1), without).renderables[0].plain
