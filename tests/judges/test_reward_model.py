"""A reward model from a folder: its scores are the classifier's own, one text at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_chat_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from prefopt_ray.errors import JudgeError
from prefopt_ray.judges.base import Prompt, silent
from prefopt_ray.judges.reward_model import RewardModel, check_reward_model
from prefopt_ray.pairs.shapes import Message
from prefopt_ray.train.scorers import Completion

TURNS = (Message("user", "the user asks"), Message("assistant", "a few words"), Message("user", "and again"))
PROMPTS = [Prompt("user asks", (Message("user", "user asks"),)), Prompt("...", TURNS), Prompt("the user")] * 4
SAID = [Completion("the assistant answers " * count, count, finished=True) for count in range(1, 13)]


def save_reward_model(folder: Path, *, pad: bool, outputs: int = 1) -> Path:
    """Random weights over the tiny chat model's tokenizer; `pad` = the model defines a padding token."""
    save_chat_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_labels=outputs,
        pad_token_id=tokenizer.pad_token_id if pad else None,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [True, False])
def test_batches_score_like_one_text_at_a_time_through_the_template(tmp_path: Path, pad: bool) -> None:
    folder = save_reward_model(tmp_path / "rm", pad=pad)
    scores = RewardModel(str(folder), device="cpu").score(PROMPTS, SAID, advance=silent)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt, completion, score in zip(PROMPTS, SAID, scores, strict=True):
        turns = [{"role": t.role, "content": t.content} for t in prompt.turns or (Message("user", prompt.text),)]
        ids = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": completion.text}], return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0, -1]  # the last token, whatever it is
            expected = float(model.score(states))
        assert score == pytest.approx(expected, abs=1e-5)


def test_without_a_template_the_texts_follow_each_other(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "rm", pad=True)
    for file in folder.glob("chat_template*"):
        file.unlink()
    judge = RewardModel(str(folder), device="cpu")
    whole = judge.score([Prompt("the user asks")], [Completion(" a few words", 3, finished=True)], advance=silent)
    other = judge.score([Prompt("the user asks a few")], [Completion(" words", 1, finished=True)], advance=silent)
    assert whole == pytest.approx(other)


def test_a_text_beyond_the_model_s_length_keeps_the_completion(tmp_path: Path) -> None:
    judge = RewardModel(str(save_reward_model(tmp_path / "rm", pad=True)), device="cpu")
    long = Prompt("many words " * 500)
    scores = judge.score([long, long], [SAID[0], SAID[5]], advance=silent)
    assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[int] = []
    judge = RewardModel(str(save_reward_model(tmp_path / "rm", pad=False)), device="cpu")
    judge.score(PROMPTS, SAID, advance=told.append)
    assert told == list(range(1, 13))


def test_what_is_no_reward_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="2 outputs.*exactly one output"):
        check_reward_model(str(save_reward_model(tmp_path / "two", pad=True, outputs=2)))
    with pytest.raises(JudgeError, match="cannot be loaded"):
        check_reward_model(str(tmp_path / "nothing"))


def test_a_base_model_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    folder = save_chat_model(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "reward"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JudgeError, match="score.weight first.*random numbers"):
        RewardModel(str(folder), device="cpu")
