"""Ragged sequences keep every token of every sequence, in any order they are taken."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.pairs.tokens import Ragged

SEQUENCES = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=8)


@given(sequences=SEQUENCES, data=st.data())
def test_taking_gives_the_sequences_in_the_order_asked_for(sequences: list[list[int]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=12))
    taken = Ragged.from_lists(sequences).take(np.array(wanted, dtype=np.int64))
    assert [taken[i].tolist() for i in range(len(taken))] == [sequences[i] for i in wanted]
    assert taken.values.dtype == np.int32 and taken.offsets.dtype == np.int64


@given(sequences=SEQUENCES)
def test_arrays_and_lists_make_the_same(sequences: list[list[int]]) -> None:
    one, other = Ragged.from_lists(sequences), Ragged.from_rows([np.array(s, dtype=np.int64) for s in sequences])
    assert np.array_equal(one.values, other.values) and np.array_equal(one.offsets, other.offsets)
    assert one.values.dtype == other.values.dtype == np.int32


def test_nothing_taken_is_empty() -> None:
    assert len(Ragged.from_lists([[1, 2]]).take(np.array([], dtype=np.int64))) == 0
    assert len(Ragged.from_rows([])) == 0
