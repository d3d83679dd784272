"""The base model: learns the language, loads like any model, is built the same every time and only once."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_ray.gold import base as gold_base_module
from prefopt_ray.gold.base import BaseRecipe, build_gold_base, corpus_ids, ensure_gold_base
from prefopt_ray.gold.language import EOS, SEP, TOKEN_IDS, chain_logp, draw_corpus

HELD_OUT_SEED = 99


def digest(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir()) if file.is_file()
    }


def language_nll(seed: int, rows: int) -> float:
    """Nats per token of the language itself, EOS included: what no model can beat."""
    total = tokens = 0.0
    chain = np.exp(chain_logp())
    for prompt, completion, length in zip(*draw_corpus(np.random.default_rng(seed), rows)):
        previous = prompt[-1]
        for position, word in enumerate(completion[:length]):
            total -= np.log(0.8 * chain[previous, word] + 0.2 * np.mean(prompt == word))
            previous = word
        total += np.log(9)  # nine equally likely lengths
        tokens += length + 1
    return total / tokens


@pytest.fixture
def short_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gold_base_module, "RECIPE", BaseRecipe(steps=8))


def test_base_model_comes_close_to_the_entropy_of_the_language(gold_base: Path):
    model = AutoModelForCausalLM.from_pretrained(gold_base)
    ids = corpus_ids(HELD_OUT_SEED, 2000)
    with torch.no_grad():
        logp = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)  # oracle: float64, masks by hand
    total = count = 0.0
    for row, sequence in enumerate(ids.tolist()):
        end = sequence.index(TOKEN_IDS[EOS])
        total -= sum(logp[row, at - 1, sequence[at]].item() for at in range(6, end + 1))
        count += end - 5
    floor = language_nll(HELD_OUT_SEED, 2000)
    assert floor == pytest.approx(2.21, abs=0.02)
    assert floor < total / count < floor + 0.05


def test_text_becomes_one_token_per_word_with_bos_and_without_eos(gold_base: Path):
    tokenizer = AutoTokenizer.from_pretrained(gold_base)
    prompt = tokenizer.encode("a c f b >")
    assert prompt == [TOKEN_IDS["<s>"], 0, 2, 5, 1, TOKEN_IDS[SEP]]
    assert tokenizer.encode("d e a", add_special_tokens=False) == [3, 4, 0]
    for joined in ("a c f b >d e a", "a c f b > d e a"):
        assert tokenizer.encode(joined) == [*prompt, 3, 4, 0]
    assert tokenizer.decode([*prompt, 3, 4, 0, TOKEN_IDS[EOS]], skip_special_tokens=True) == "a c f b > d e a"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.chat_template is None
    assert len(tokenizer) == 20


def test_a_word_outside_the_language_is_refused(gold_base: Path):
    with pytest.raises(Exception, match="vocabulary"):
        AutoTokenizer.from_pretrained(gold_base).encode("a z")


def test_lora_reaches_every_linear_of_the_base(gold_base: Path):
    model = AutoModelForCausalLM.from_pretrained(gold_base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert len(trainable) == 2 * 7 * 2  # A and B, seven linears, two layers


def test_same_seed_gives_the_same_bytes_whatever_the_thread_count(tmp_path: Path, short_recipe: None):
    threads = torch.get_num_threads()
    build_gold_base(tmp_path / "one")
    torch.set_num_threads(threads + 1)
    try:
        build_gold_base(tmp_path / "two")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    build_gold_base(tmp_path / "other", seed=1)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert digest(tmp_path / "one")["model.safetensors"] != digest(tmp_path / "other")["model.safetensors"]


def test_building_leaves_the_global_rng_alone(tmp_path: Path, short_recipe: None):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    build_gold_base(tmp_path / "base")
    assert torch.equal(before, torch.random.get_rng_state())


def test_cached_base_is_not_built_again_and_a_new_recipe_is(
    tmp_path: Path, short_recipe: None, monkeypatch: pytest.MonkeyPatch
):
    steps: list[tuple[int, int]] = []
    first = ensure_gold_base(tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 8) for done in range(1, 9)]
    again = ensure_gold_base(tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert again == first and len(steps) == 8
    monkeypatch.setattr(gold_base_module, "RECIPE", BaseRecipe(steps=9))
    assert ensure_gold_base(tmp_path) != first


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, short_recipe: None):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_gold_base(tmp_path, progress=interrupt)
    assert list((tmp_path / "gold").iterdir()) == []


def test_a_builder_that_comes_second_keeps_the_first_ones_base(tmp_path: Path, short_recipe: None):
    """Both found no base and both build; the race is made certain by building once more in the middle of a build."""
    first: list[dict[str, str]] = []

    def race(done: int, total: int) -> None:
        if done == 3:
            first.append(digest(ensure_gold_base(tmp_path)))

    folder = ensure_gold_base(tmp_path, progress=race)
    assert list((tmp_path / "gold").iterdir()) == [folder]
    assert digest(folder) == first[0]
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
