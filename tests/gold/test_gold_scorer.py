"""The gold scorer reads text as a sampler decodes it and pays what the definition says."""

import numpy as np
import pytest
from gold.oracle import slow_reward

from prefopt_ray.errors import DataError
from prefopt_ray.gold.language import TOKEN_IDS, WORDS, draw_corpus
from prefopt_ray.gold.scorer import GoldScorer
from prefopt_ray.train.scorers import Completion, Scorer


def test_text_scores_match_a_slow_loop():
    prompts, completions, lengths = draw_corpus(np.random.default_rng(2), 200)
    finished = np.random.default_rng(3).random(200) < 0.8
    prompt_texts = [" ".join([*(WORDS[w] for w in row), ">"]) for row in prompts]
    samples = [
        Completion(" ".join(WORDS[w] for w in row[:n]), tokens=int(n), finished=bool(f))
        for row, n, f in zip(completions, lengths, finished)
    ]
    scorer: Scorer = GoldScorer()
    slow = [slow_reward(p.tolist(), c[:n].tolist(), f) for p, c, n, f in zip(prompts, completions, lengths, finished)]
    np.testing.assert_allclose(scorer.score(prompt_texts, samples), slow, atol=1e-12)
    assert scorer.name == "gold"


def test_bos_in_the_prompt_text_changes_nothing():
    sample = [Completion("d e a", tokens=3, finished=True)]
    assert GoldScorer().score(["<s> a c f b >"], sample) == GoldScorer().score(["a c f b >"], sample)


def test_tokens_the_decoder_hides_still_count():
    open_text = GoldScorer().score(["a c f b >"], [Completion("d e <pad> <pad>", tokens=4, finished=True)])
    hidden = GoldScorer().score(["a c f b >"], [Completion("d e", tokens=4, finished=True)])
    honest = GoldScorer().score(["a c f b >"], [Completion("d e", tokens=2, finished=True)])
    assert open_text == hidden != honest
    expected = slow_reward([0, 2, 5, 1], [3, 4, TOKEN_IDS["<pad>"], TOKEN_IDS["<pad>"]], finished=True)
    assert hidden[0] == pytest.approx(expected)


def test_empty_completions_and_no_completions_are_finite():
    assert GoldScorer().score([], []).shape == (0,)
    assert GoldScorer().score(["a c f b >"], [Completion("", tokens=0, finished=True)])[0] == pytest.approx(-2.8)


@pytest.mark.parametrize(("prompt", "text"), [("How are you?", "d e a"), ("a c f >", "d e a"), ("a c f b >", "fine")])
def test_text_of_another_language_is_refused(prompt: str, text: str):
    with pytest.raises(DataError, match="gold scorer"):
        GoldScorer().score([prompt], [Completion(text, tokens=len(text.split()), finished=True)])


def test_prompts_and_completions_must_match_in_number():
    with pytest.raises(ValueError, match="2 prompts but 1"):
        GoldScorer().score(["a c f b >", "a c f b >"], [Completion("d", tokens=1, finished=True)])
