"""The one cut per pair. Oracle: the rule in words, checked token by token on arbitrary lengths."""

from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.pairs.encode import cut_pair

BOS, END = 1, 2
tokens = st.lists(st.integers(10, 99), min_size=1, max_size=60)


@given(tokens, tokens, tokens, st.integers(8, 80), st.booleans())
def test_the_cut_follows_the_rule(prompt, chosen, rejected, limit, has_bos):
    prompt = [BOS, *prompt] if has_bos else prompt
    chosen, rejected = [*chosen, END], [*rejected, END]
    p, c, r = cut_pair(prompt, chosen, rejected, max_tokens=limit, bos=BOS)
    longest = max(len(chosen), len(rejected))

    assert len(p) + max(len(c), len(r)) <= limit
    assert len(p) + max(len(c), len(r)) == min(limit, len(prompt) + longest)  # nothing is given up without need
    assert len(p) >= min(len(prompt), limit // 4)
    if has_bos:
        assert p[0] == BOS
    body, whole = (p[1:], prompt[1:]) if has_bos else (p, prompt)
    assert body == whole[len(whole) - len(body):]  # the prompt loses its start
    assert (c, r) == (chosen[: len(c)], rejected[: len(r)])  # completions lose their ends
    if len(c) < len(chosen) or len(r) < len(rejected):  # ... and only when the prompt is at its quarter
        assert len(p) == min(len(prompt), limit // 4)
    for cut, original in ((c, chosen), (r, rejected)):
        assert (cut[-1] == END) == (len(cut) == len(original))


def test_a_long_prompt_gives_way_before_the_completions():
    prompt, chosen, rejected = [BOS, *range(10, 40)], [50, 51, END], [60, 61, 62, END]
    assert cut_pair(prompt, chosen, rejected, max_tokens=12, bos=BOS) == ([BOS, *range(33, 40)], chosen, rejected)


def test_the_prompt_keeps_a_quarter_and_both_completions_share_the_room():
    prompt, chosen, rejected = [BOS, *range(10, 40)], [*range(50, 80), END], [60, 61, END]
    expected = ([BOS, 38, 39], [*range(50, 59)], rejected)
    assert cut_pair(prompt, chosen, rejected, max_tokens=12, bos=BOS) == expected


def test_a_pair_that_fits_is_untouched():
    assert cut_pair([BOS, 10], [11, END], [12, END], max_tokens=8, bos=BOS) == ([BOS, 10], [11, END], [12, END])
