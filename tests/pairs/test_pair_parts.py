"""Parts: disjoint by first human turn, deterministic, every row accounted for. Oracle: sets of prompts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt_ray.errors import DataError
from prefopt_ray.pairs.config import PairsConfig, PartConfig, SourceConfig
from prefopt_ray.pairs.load import LoadedPairs, load_sweep_data
from prefopt_ray.pairs.parts import group_id
from prefopt_ray.pairs.shapes import DropReason


def rows(prompts: list[int], name: str = "p") -> tuple[dict, ...]:
    return tuple({"prompt": f"{name}{prompt} ?", "chosen": f" good {i}", "rejected": f" bad {i}"}
                 for i, prompt in enumerate(prompts))


def source(values: tuple[dict, ...], name: str = "rows") -> SourceConfig:
    return SourceConfig(name, rows=values)


def config(train: PartConfig, select: PartConfig, test: PartConfig, **options) -> PairsConfig:
    return PairsConfig(train, select, test, text="plain", max_tokens=64, **options)


def carved(values: tuple[dict, ...], *, select: int, test: int, seed: int = 0) -> PairsConfig:
    return config(PartConfig(source(values)), PartConfig(None, select), PartConfig(None, test), seed=seed)


def groups(loaded: LoadedPairs) -> dict[str, set[int]]:
    return {name: set(part.groups.tolist()) for name, part in loaded.data.parts.items()}


def row_ids(loaded: LoadedPairs, part: str) -> list[int]:
    return loaded.data.parts[part].row_ids.tolist()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=60).filter(lambda p: len(set(p)) >= 3),
       st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_every_row_is_in_one_part_or_dropped_and_no_prompt_in_two(plain_tokenizer, prompts, select, test, seed):
    values = rows(prompts)
    try:
        loaded = load_sweep_data(carved(values, select=select, test=test, seed=seed), plain_tokenizer, cache=None)
    except DataError as error:  # duplicates may leave nothing to train on
        assert "no prompt is left for this part" in str(error)
        return
    by_part = groups(loaded)
    assert not by_part["train"] & by_part["select"]
    assert not (by_part["train"] | by_part["select"]) & by_part["test"]
    assert len(loaded.data.test) <= test and len(loaded.data.select) <= select
    placed = [row for part in ("train", "select", "test") for row in row_ids(loaded, part)]
    assert sorted(placed + [drop.row for drop in loaded.drops]) == list(range(len(values)))


def test_carved_parts_have_the_pairs_asked_for_and_train_the_rest(make_tokenizer):
    loaded = load_sweep_data(carved(rows(list(range(100))), select=20, test=30), make_tokenizer(), cache=None)
    assert {name: len(part) for name, part in loaded.data.parts.items()} == {"train": 50, "select": 20, "test": 30}
    assert loaded.drops == ()


def test_parts_depend_on_the_seed_and_a_larger_part_holds_the_smaller_one(make_tokenizer):
    def test_rows(test: int, seed: int) -> set[int]:
        chosen = carved(rows(list(range(100))), select=5, test=test, seed=seed)
        return set(row_ids(load_sweep_data(chosen, make_tokenizer(), cache=None), "test"))

    assert test_rows(10, 0) == test_rows(10, 0) != test_rows(10, 1)
    assert test_rows(10, 0) < test_rows(20, 0)


def test_the_token_ids_follow_their_row_ids(make_tokenizer):
    values = rows(list(range(40)))
    tokenizer = make_tokenizer()
    loaded = load_sweep_data(carved(values, select=5, test=5), tokenizer, cache=None)
    for part in loaded.data.parts.values():
        for index, row in enumerate(part.row_ids):
            assert tokenizer.decode(part.prompt[index]) == values[row]["prompt"]
            assert tokenizer.decode(part.chosen[index]) == values[row]["chosen"] + "</s>"
            assert tokenizer.decode(part.rejected[index]) == values[row]["rejected"] + "</s>"
            assert part.groups[index] == group_id(values[row]["prompt"])


def test_separate_sources_lose_prompts_that_a_later_part_holds(make_tokenizer):
    chosen = config(PartConfig(source(rows([1, 2, 3, 4, 4]))), PartConfig(source(rows([2, 5, 6]), "b")),
                    PartConfig(source(rows([4, 5]), "c")))
    loaded = load_sweep_data(chosen, make_tokenizer(), cache=None)
    assert (row_ids(loaded, "train"), row_ids(loaded, "select"), row_ids(loaded, "test")) == ([0, 2], [0, 2], [0, 1])
    assert [(d.part, d.row, d.reason) for d in loaded.drops] == [
        ("train", 1, DropReason.ALSO_IN_SELECT), ("train", 3, DropReason.ALSO_IN_TEST),
        ("train", 4, DropReason.ALSO_IN_TEST), ("select", 1, DropReason.ALSO_IN_TEST),
    ]


def test_a_system_turn_or_other_whitespace_does_not_make_another_prompt(make_tokenizer):
    ask = {"chosen": "a", "rejected": "b"}
    chosen = config(
        PartConfig(source(({**ask, "prompt": "What  is\n2?"}, {**ask, "prompt": "other"}))),
        PartConfig(source(({**ask, "prompt": "third"},), "b")),
        PartConfig(source(({**ask, "prompt": "What is 2?", "system": "Be brief."},), "c")),
    )
    assert row_ids(load_sweep_data(chosen, make_tokenizer(), cache=None), "train") == [1]


def test_select_and_test_can_share_a_source(make_tokenizer):
    held_out = source(rows(list(range(50)), "q"), "held out")
    chosen = config(PartConfig(source(rows([1, 2]))), PartConfig(held_out, 20), PartConfig(held_out, 30))
    loaded = load_sweep_data(chosen, make_tokenizer(), cache=None)
    assert sorted(row_ids(loaded, "select") + row_ids(loaded, "test")) == list(range(50))


def test_dropped_pairs_are_replaced_so_that_a_part_has_its_pairs(make_tokenizer):
    same = "same " * 100
    cut_alike = [{"prompt": f"p{i}", "chosen": f"{same}{i}", "rejected": same} for i in range(30)]
    usable = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(30)]
    values = tuple(row for both in zip(usable, cut_alike) for row in both)  # odd rows are cut alike
    loaded = load_sweep_data(carved(values, select=10, test=10), make_tokenizer(), cache=None)
    assert {name: len(part) for name, part in loaded.data.parts.items()} == {"train": 10, "select": 10, "test": 10}
    assert sorted(d.row for d in loaded.drops) == list(range(1, 60, 2))
    assert {d.reason for d in loaded.drops} == {DropReason.IDENTICAL_AFTER_CUT}


def test_nothing_left_for_a_part_names_who_holds_the_prompts(make_tokenizer):
    with pytest.raises(DataError, match=r"rows data.train: got 10 usable pairs; test holds 6 prompts, select"):
        load_sweep_data(carved(rows(list(range(10))), select=5, test=6), make_tokenizer(), cache=None)


def test_a_stray_malformed_row_in_a_large_file_is_dropped_counted_and_named(make_tokenizer):
    values = list(rows(list(range(200))))
    values[17] = {"prompt": "p", "chosen": None, "rejected": "x"}
    loaded = load_sweep_data(carved(tuple(values), select=10, test=10), make_tokenizer(), cache=None)
    (drop,) = loaded.drops
    assert (drop.row, drop.reason) == (17, DropReason.MALFORMED)
    assert "rows row 17 chosen: got null" in drop.detail
    assert "malformed rows dropped: 1" in loaded.warnings
    values[18] = values[19] = values[17]
    with pytest.raises(DataError, match="row 18 chosen: got null"):
        load_sweep_data(carved(tuple(values), select=10, test=10), make_tokenizer(), cache=None)


def test_impossible_numbers_are_refused_together():
    with pytest.raises(DataError) as refused:
        PairsConfig(PartConfig(None), PartConfig(None, 0), PartConfig(None), max_tokens=4)
    keys = {problem.key for problem in refused.value.problems}
    assert keys == {"train", "max_tokens", "train.pairs", "select.pairs", "test.pairs"}
