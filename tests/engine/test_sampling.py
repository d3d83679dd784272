"""Samples of the policy: from the whole distribution, repeatable, with exact divergences per position."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine.oracle import slow_divergence, slow_token_logps, stepped
from tiny import VOCABULARY, random_pairs, tiny_engine, tiny_llama, trial_config

from prefopt_ray.engine.base import REFERENCE, Samples
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.pairs.tokens import PairTokens, Ragged


def peaked_llama() -> torch.nn.Module:
    """With a distribution far from uniform, where sharpening would show."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def repeated(prompt: list[int], count: int) -> Ragged:
    return Ragged.from_lists([prompt] * count)


def same(first: Samples, second: Samples) -> bool:
    return all(
        np.array_equal(a, b)
        for a, b in [
            (first.completions.values, second.completions.values),
            (first.completions.offsets, second.completions.offsets),
            (first.finished, second.finished), (first.kl, second.kl), (first.entropy, second.entropy),
        ]
    )


def test_samples_depend_on_the_seed_alone() -> None:
    engine, prompts = tiny_engine(), random_pairs(16).prompt
    torch.manual_seed(1)
    first = engine.sample(REFERENCE, prompts, max_new_tokens=8, seed=3)
    torch.manual_seed(2)
    assert same(first, engine.sample(REFERENCE, prompts, max_new_tokens=8, seed=3))
    assert not same(first, engine.sample(REFERENCE, prompts, max_new_tokens=8, seed=4))


def test_sampling_leaves_the_global_random_stream_alone() -> None:
    engine = tiny_engine()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.open(0, trial_config())
    engine.sample(0, random_pairs(4).prompt, max_new_tokens=4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_tokens_follow_the_models_whole_distribution() -> None:
    """Chi-square over all 64 tokens at 4,000 draws, though the model's own settings ask for its top token."""
    model, prompt, draws = peaked_llama(), [5, 9, 30], 4000
    settings = model.generation_config
    settings.do_sample, settings.top_k, settings.top_p, settings.temperature = True, 1, 0.1, 0.1
    settings.min_p, settings.repetition_penalty, settings.suppress_tokens = 0.9, 5.0, list(range(10, VOCABULARY))
    settings.no_repeat_ngram_size, settings.min_new_tokens = 1, 3
    engine = PlainEngine(model, plan=tiny_engine().plan, pad_id=0, eos_ids=())
    samples = engine.sample(REFERENCE, repeated(prompt, draws), max_new_tokens=1, seed=0)
    counts = np.bincount(samples.completions.values, minlength=VOCABULARY)
    with torch.no_grad():
        expected = draws * slow_token_logps(model, np.array(prompt), np.array([0]))[0].exp().numpy()
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 4 * np.sqrt(2 * 63)
    assert settings.top_k == 1, "the model's own settings are exported with it and must stay"


def test_later_tokens_are_conditioned_on_earlier_ones_and_on_the_prompt_behind_padding() -> None:
    """Pairs of tokens against the product of conditionals, with prompts of unequal lengths in one batch."""
    model, prompt, draws = peaked_llama(), [5, 9], 3000
    long = list(range(3, 15))
    prompts = Ragged.from_lists([prompt, long] * draws)
    engine = PlainEngine(model, plan=tiny_engine().plan, pad_id=0, eos_ids=())
    drawn = engine.sample(REFERENCE, prompts, max_new_tokens=2, seed=1).completions
    pairs = np.stack([drawn[i] for i in range(0, len(drawn), 2)])
    with torch.no_grad():
        first = slow_token_logps(model, np.array(prompt), np.array([0]))[0].exp().numpy()
        token = int(first.argmax())
        second = slow_token_logps(model, np.array([*prompt, token]), np.array([0]))[0].exp().numpy()
    following = pairs[pairs[:, 0] == token, 1]
    share = np.bincount(following, minlength=VOCABULARY) / len(following)
    assert len(following) > 100
    assert np.abs(share - second).max() < 4 * np.sqrt(0.25 / len(following))


def test_gradient_checkpointing_does_not_change_what_is_sampled() -> None:
    """transformers' own switch takes the cache away while sampling, and with it all but the last token."""
    engine, prompts = tiny_engine(peaked_llama()), random_pairs(16).prompt
    expected = engine.sample(REFERENCE, prompts, max_new_tokens=8, seed=0)
    engine.open(0, trial_config(gradient_checkpointing=True))
    assert np.array_equal(
        engine.sample(0, prompts, max_new_tokens=8, seed=0).completions.values, expected.completions.values
    )


def test_a_completion_ends_before_its_end_token_and_the_position_of_that_counts() -> None:
    engine = PlainEngine(tiny_llama(), plan=tiny_engine().plan, pad_id=2, eos_ids=tuple(range(2, 20)))
    samples = engine.sample(REFERENCE, random_pairs(64).prompt, max_new_tokens=6, seed=0)
    lengths = samples.completions.lengths
    assert np.isin(samples.completions.values, range(2, 20)).sum() == 0
    assert 0 < samples.finished.sum() < 64
    assert (samples.positions == lengths + samples.finished).all()
    assert (lengths[~samples.finished] == 6).all()
    assert (lengths == 0).any(), "ending at once is a valid sample"


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_kl_and_entropy_are_sums_over_positions_and_vocabulary(adapter: str) -> None:
    """Against a double loop over the vocabulary in float64; and KL is what k1 estimates."""
    base = tiny_llama()
    engine, _ = stepped(deepcopy(base), steps=12, adapter=adapter, learning_rate=2e-2)
    prompts = random_pairs(12, seed=5).prompt
    samples = engine.sample(0, prompts, max_new_tokens=5, seed=0)
    policy, reference = deepcopy(engine._model).double(), base.double()
    for i in range(len(prompts)):
        if samples.finished[i]:
            continue  # its end token is not part of the completion handed out
        kl, entropy, _ = slow_divergence(policy, reference, prompts[i], samples.completions[i])
        assert samples.kl[i] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert samples.entropy[i] == pytest.approx(entropy, rel=1e-4)


def test_kl_agrees_with_the_mean_log_ratio_of_what_was_drawn() -> None:
    """Rao-Blackwell and Monte-Carlo k1 have one mean: within 3.5 standard errors at 1,500 samples, and less noise."""
    base = tiny_llama()
    engine, _ = stepped(deepcopy(base), steps=15, learning_rate=2e-2)
    engine._eos_ids = ()  # every completion has all its tokens, so k1 can be scored from what is handed out
    prompts = repeated([5, 9, 30], 1500)
    samples = engine.sample(0, prompts, max_new_tokens=4, seed=7)
    drawn = log_ratios(engine, samples, prompts)
    error = drawn.std() / np.sqrt(len(drawn))
    assert samples.kl.mean() > 10 * samples.kl.std() / np.sqrt(len(drawn))
    assert abs(drawn.mean() - samples.kl.mean()) < 3.5 * error
    assert samples.kl.std() < drawn.std()


def log_ratios(engine: PlainEngine, samples: Samples, prompts: Ragged) -> np.ndarray:
    """(M,) log pi - log ref of each drawn completion, through the engine's scoring."""
    rows = np.arange(len(prompts))
    pairs = PairTokens(rows, rows, prompts, samples.completions, samples.completions)
    return (engine.score(0, pairs) - engine.score(REFERENCE, pairs))[:, 0].astype(np.float64)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_an_untrained_policy_has_no_kl(adapter: str) -> None:
    engine = tiny_engine()
    engine.open(0, trial_config(adapter=adapter))
    assert (engine.sample(0, random_pairs(8).prompt, max_new_tokens=6, seed=0).kl == 0).all()


def test_large_prompt_sets_are_drawn_in_parts() -> None:
    engine = tiny_engine()
    engine.plan = replace(engine.plan, scoring_tokens=100)
    samples = engine.sample(REFERENCE, random_pairs(20).prompt, max_new_tokens=5, seed=0)
    assert len(samples.completions) == len(samples.kl) == len(samples.positions) == 20
    assert len({samples.completions[i].tobytes() for i in range(20)}) > 15, "parts must not repeat each other's draws"
