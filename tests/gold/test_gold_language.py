"""The gold language against arithmetic done by hand and a slow loop written from the definition."""

from itertools import pairwise

import numpy as np
import pytest
from gold.oracle import ids, slow_reward

from prefopt_ray.gold.language import (
    MAX_WORDS,
    MIN_WORDS,
    TOKEN_IDS,
    chain_logp,
    draw_corpus,
    gold_rewards,
    prompt_words,
)


def reward(prompt: str, completion: str, *, finished: bool = True) -> float:
    tokens = ids(completion) or [TOKEN_IDS["<pad>"]]
    length = len(completion.split())
    return float(
        gold_rewards(
            np.array([ids(prompt)]), np.array([tokens]), lengths=np.array([length]), finished=np.array([finished])
        )[0]
    )


def fluency(text: str) -> float:
    """0.7 min(mean chain log-prob + 3, 1) of a path, by hand."""
    path = ids(text)
    steps = [chain_logp()[first, second] for first, second in pairwise(path)]
    return 0.7 * min(sum(steps) / len(steps) + 3.0, 1.0)


def test_chain_rows_are_distributions_with_the_stated_spread():
    logp = chain_logp()
    np.testing.assert_allclose(np.exp(logp).sum(axis=1), 1.0, atol=1e-12)
    assert logp.std(axis=1).mean() == pytest.approx(1.5, abs=0.15)
    with pytest.raises(ValueError, match="read-only"):
        logp[0, 0] = 0.0


def test_every_prompt_has_one_number():
    words = prompt_words(np.arange(16**4))
    assert words.min() == 0 and words.max() == 15
    assert len({tuple(row) for row in words.tolist()}) == 16**4


def test_full_coverage_at_length_eight_pays_one_per_prompt_word():
    assert reward("a b c d", "a e b f c g d h") == pytest.approx(4 + fluency("d a e b f c g d h"))


def test_a_word_twice_in_the_prompt_is_covered_once():
    assert reward("a a b c", "a e b f g h i j") == pytest.approx(2 + fluency("c a e b f g h i j"))


def test_repeats_and_third_uses_cost_half_each():
    # e e: two neighbours equal; e three times: one use beyond the second
    assert reward("a b c d", "e e f e g h i j") == pytest.approx(-0.5 - 0.5 + fluency("d e e f e g h i j"))


def test_length_away_from_eight_costs_and_so_does_a_missing_end():
    assert reward("a b c d", "e f g h i") == pytest.approx(-3 * 0.35 + fluency("d e f g h i"))
    assert reward("a b c d", "e f g h i", finished=False) == pytest.approx(-2 - 3 * 0.35 + fluency("d e f g h i"))


def test_empty_completion_costs_its_length_only():
    assert reward("a b c d", "") == pytest.approx(-8 * 0.35)


def test_a_token_that_is_no_word_is_never_fluent():
    assert reward("a b c d", ">") == pytest.approx(-7 * 0.35 + 0.7 * min(chain_logp().min() + 3.0, 1.0))


def test_rewards_match_a_slow_loop_on_hostile_input():
    rng = np.random.default_rng(3)
    prompts = rng.integers(16, size=(300, 4))
    completions = rng.integers(20, size=(300, 16))
    completions[:100] = completions[:100] % 3  # many repeats
    lengths, finished = rng.integers(0, 17, size=300), rng.random(300) < 0.5
    fast = gold_rewards(prompts, completions, lengths=lengths, finished=finished)
    slow = [
        slow_reward(p.tolist(), c[:n].tolist(), f) for p, c, n, f in zip(prompts, completions, lengths, finished)
    ]
    np.testing.assert_allclose(fast, slow, atol=1e-12)


def test_filler_past_the_length_changes_nothing():
    rng = np.random.default_rng(4)
    prompts, completions, lengths = draw_corpus(rng, 50)
    other = np.where(np.arange(MAX_WORDS) < lengths[:, None], completions, rng.integers(20, size=completions.shape))
    kwargs = {"lengths": lengths, "finished": np.ones(50, dtype=bool)}
    np.testing.assert_array_equal(
        gold_rewards(prompts, completions, **kwargs), gold_rewards(prompts, other, **kwargs)
    )


def test_corpus_is_the_same_for_the_same_seed_only():
    first, again, other = (draw_corpus(np.random.default_rng(seed), 100) for seed in (5, 5, 6))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[1], other[1])


def test_corpus_follows_the_chain_with_a_fifth_copied_from_the_prompt():
    prompts, completions, lengths = draw_corpus(np.random.default_rng(0), 40_000)
    assert sorted(set(lengths.tolist())) == list(range(MIN_WORDS, MAX_WORDS + 1))
    # After word 0 the next word is 0.8 chain + 0.2 prompt; a uniform prompt word is uniform over 16.
    follows = completions[:, 1:][completions[:, :-1] == 0]
    seen = np.bincount(follows, minlength=16) / len(follows)
    # The prompt is not uniform given that 0 was just said (0 may be copied from it): bounded by the slack.
    np.testing.assert_allclose(seen, 0.8 * np.exp(chain_logp()[0]) + 0.2 / 16, atol=0.02)
    first_from_prompt = 0.2 + 0.8 * np.mean(
        [np.exp(chain_logp()[p[-1]])[sorted(set(p))].sum() for p in prompts[:5000].tolist()]
    )
    in_prompt = (completions[:, :1] == prompts).any(axis=1).mean()
    assert in_prompt == pytest.approx(first_from_prompt, abs=0.01)


def test_corpus_completions_score_as_the_task_was_calibrated():
    prompts, completions, lengths = draw_corpus(np.random.default_rng(1), 20_000)
    rewards = gold_rewards(prompts, completions, lengths=lengths, finished=np.ones(20_000, dtype=bool))
    assert rewards.mean() == pytest.approx(1.1, abs=0.05)
    assert rewards.std() == pytest.approx(1.35, abs=0.1)
    assert rewards.max() <= 4.7
