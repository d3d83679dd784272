"""A reward model from a folder or the hub: a sequence classifier with one output scores prompt and completion.

Texts go through the model's own chat template, or one after the other when it has none. Knows no policy.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt_ray.errors import JudgeError, Problem
from prefopt_ray.judges.base import Advance, Prompt
from prefopt_ray.train.scorers import Completion

BATCH_TOKENS = 16_384  # padded tokens of one forward


def check_reward_model(place: str) -> None:
    """Raise JudgeError when the model's files cannot be read or it is no reward model; loads no weights."""
    try:
        config = AutoConfig.from_pretrained(place)
        AutoTokenizer.from_pretrained(place)
    except Exception as error:  # noqa: BLE001 - a damaged file raises whatever its content led to
        raise JudgeError(_cannot_load(place, error)) from error
    if config.num_labels != 1:
        raise JudgeError(Problem(
            place, "judge.reward_model", f"{config.num_labels} outputs", "a reward model has exactly one output",
            "name a model trained with num_labels=1",
        ))


class RewardModel:
    """A pointwise judge. Raises JudgeError when it cannot be loaded."""

    def __init__(self, place: str, *, device: str) -> None:
        check_reward_model(place)
        self.name = place
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
        self._model = _load(place, device)
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._longest = min(limit or self._tokenizer.model_max_length, self._tokenizer.model_max_length)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], *, advance: Advance) -> np.ndarray:
        """(N,) float64 rewards. Texts beyond the model's length lose their beginning, never the completion's end."""
        rows = [self._ids(prompt, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]
        out = np.empty(len(rows))
        done = 0
        for batch in self._batches(rows):
            out[batch] = self._rewards([rows[i] for i in batch])
            done += len(batch)
            advance(done)
        if not np.isfinite(out).all():
            rule = "some rewards are not finite"
            raise JudgeError(Problem(self.name, "judge.reward_model", "", rule, "use another model"))
        return out

    def _ids(self, prompt: Prompt, completion: str) -> list[int]:
        if self._tokenizer.chat_template:
            turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
            turns = turns or [{"role": "user", "content": prompt.text}]
            turns = [*turns, {"role": "assistant", "content": completion}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them
        else:
            ids = self._tokenizer(prompt.text + completion)["input_ids"]
        return ids[-self._longest :] or [self._tokenizer.eos_token_id or 0]

    def _batches(self, rows: Sequence[list[int]]) -> list[np.ndarray]:
        """Rows of like length together. One by one where the model defines no padding: it reads its reward at the
        last token that is no padding, and with a borrowed one such as the end of turn that is the wrong place."""
        order = np.argsort([len(row) for row in rows], kind="stable")
        if self._pad_id is None:
            return list(order[:, None])
        batches, start = [], 0
        for end in range(1, len(order) + 1):
            longer = end == len(order) or (end - start + 1) * len(rows[order[end]]) > BATCH_TOKENS
            if longer:
                batches.append(order[start:end])
                start = end
        return batches

    @property
    def _pad_id(self) -> int | None:
        return self._model.config.get_text_config().pad_token_id

    def _rewards(self, rows: Sequence[list[int]]) -> np.ndarray:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._pad_id or 0)  # (B, T)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        with torch.inference_mode():
            device = self._model.device
            logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits  # (B, 1)
        return logits[:, 0].double().cpu().numpy()


def _load(place: str, device: str) -> PreTrainedModel:
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            place, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # noqa: BLE001 - as above
        raise JudgeError(_cannot_load(place, error)) from error
    if found["missing_keys"]:
        missing = found["missing_keys"]
        raise JudgeError(Problem(
            place, "judge.reward_model", f"{len(missing)} weights missing, {min(missing)} first",
            "transformers would fill them with random numbers", "name a trained reward model, not a base model",
        ))
    return model.to(device).eval()


def _cannot_load(place: str, error: Exception) -> Problem:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    fix = "give a folder with config.json, *.safetensors and tokenizer files, or a hub id (network needed once)"
    return Problem(place, "judge.reward_model", "", f"the reward model cannot be loaded: {line}", fix)
