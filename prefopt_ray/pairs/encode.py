"""From pairs to token ids: one prompt for both completions, one cut per pair.

The prompt is tokenised alone, which is what the model sees when it generates. A completion is what the
tokenizer gives for prompt + completion after those very ids (so that "no leading space" tokenizers behave);
where the tokenizer would merge characters across the border, the completion is tokenised alone instead, and
such pairs are counted. Knows no files, parts or templates.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prefopt_ray.pairs.shapes import DropReason, Pair, RowDropped
from prefopt_ray.pairs.texts import PairTexts, TextForm

PROMPT_SHARE = 4  # the prompt keeps at least max_tokens // 4 (or all of itself) before completions are cut
_LEAD = "\n"


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair after the cut."""

    pair: Pair
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prompt_cut: bool
    completions_cut: int  # 0, 1 or 2 completions lost their end, and their end-of-turn token with it
    merges_at_border: bool  # the tokenizer would have merged across the border
    runs_together: bool  # no whitespace or mark between prompt and completion in plain text


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, a text form and a limit (tokens of prompt + the longer completion)."""

    tokenizer: PreTrainedTokenizerBase
    form: TextForm
    max_tokens: int

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair | RowDropped]:
        """One result per pair, in order. Tokenised in one call, so pass some hundreds."""
        texts = [_texts_or_drop(self.form, pair) for pair in pairs]
        kept = [t for t in texts if isinstance(t, PairTexts)]
        end = self.form.end.text
        prompts = self._ids([t.prompt for t in kept])
        chosen = self._completions(prompts, kept, [t.chosen + end for t in kept])
        rejected = self._completions(prompts, kept, [t.rejected + end for t in kept])
        encoded = iter(zip(kept, prompts, chosen, rejected))
        return [t if isinstance(t, RowDropped) else self._finish(pair, *next(encoded)) for pair, t in zip(pairs, texts)]

    @cached_property
    def _adds_bos(self) -> bool:
        return adds_bos(self.tokenizer)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Exactly one BOS in front if the text or the tokenizer brings one; never an automatic EOS."""
        batch = self._plain_ids(texts)
        bos = self.tokenizer.bos_token_id
        return batch if bos is None else [self._with_one_bos(ids, bos) for ids in batch]

    def _with_one_bos(self, ids: list[int], bos: int) -> list[int]:
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        return [bos, *ids[start:]] if start or self._adds_bos else ids

    def _completions(
        self, prompts: list[list[int]], texts: list[PairTexts], completions: list[str]
    ) -> list[tuple[list[int], bool]]:
        """(ids, merges at the border) per completion."""
        joint = self._ids([t.prompt + completion for t, completion in zip(texts, completions)])
        merged = [ids[: len(prompt)] != prompt for ids, prompt in zip(joint, prompts)]
        alone = iter(self._alone([c for c, m in zip(completions, merged) if m]))
        ids = [next(alone) if m else i[len(p) :] for i, p, m in zip(joint, prompts, merged)]
        if self.form.end.appended and self.form.end.token is not None:
            ids = [[*i, self.form.end.token] for i in ids]
        return list(zip(ids, merged))

    def _alone(self, completions: list[str]) -> list[list[int]]:
        """Each completion behind a line break, then without it: some tokenizers put a space before the first word."""
        lead = self._plain_ids([_LEAD])[0]
        behind = self._plain_ids([_LEAD + c for c in completions])
        bare = self._plain_ids(completions)
        return [b[len(lead) :] if lead and b[: len(lead)] == lead else i for b, i in zip(behind, bare)]

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [list(ids) for ids in batch]

    def _finish(
        self,
        pair: Pair,
        texts: PairTexts,
        prompt: list[int],
        chosen: tuple[list[int], bool],
        rejected: tuple[list[int], bool],
    ) -> EncodedPair | RowDropped:
        end = self.form.end.token
        reason = _refusal(prompt, chosen[0], rejected[0], end)
        if reason:
            return RowDropped(reason)
        cut = cut_pair(prompt, chosen[0], rejected[0], max_tokens=self.max_tokens, bos=self.tokenizer.bos_token_id)
        if cut[1] == cut[2]:
            return RowDropped(DropReason.IDENTICAL_AFTER_CUT)
        return EncodedPair(
            pair, *cut,
            prompt_cut=len(cut[0]) < len(prompt),
            completions_cut=(len(cut[1]) < len(chosen[0])) + (len(cut[2]) < len(rejected[0])),
            merges_at_border=chosen[1] or rejected[1],
            runs_together=_runs_together(texts.prompt, texts.chosen) or _runs_together(texts.prompt, texts.rejected),
        )


def cut_pair(
    prompt: list[int], chosen: list[int], rejected: list[int], *, max_tokens: int, bos: int | None
) -> tuple[list[int], list[int], list[int]]:
    """One cut for both sequences, by the longer completion.

    The prompt gives up tokens from its start (a leading BOS is kept) down to max_tokens // 4; if that is not
    enough, completions lose their ends, and their end-of-turn token with it.
    """
    longest = max(len(chosen), len(rejected))
    floor = min(len(prompt), max_tokens // PROMPT_SHARE)
    keep = min(len(prompt), max(floor, max_tokens - longest))
    if keep < len(prompt):
        head = prompt[:1] if bos is not None and prompt[0] == bos else []
        prompt = head + prompt[len(prompt) - (keep - len(head)) :]
    room = max_tokens - keep
    return prompt, chosen[:room], rejected[:room]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The tokenizer itself puts BOS in front of a text (a post-processor, or `add_bos_token`)."""
    bos = tokenizer.bos_token_id
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos] != bare[:1]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over all that decides token ids: vocabulary, merges, processors, special tokens. Not the chat template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest = hashlib.sha256(json.dumps([special, tokenizer.get_added_vocab()], sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # left over from the last call, not part of the tokenizer
            content.pop(state, None)
        digest.update(json.dumps(content, sort_keys=True).encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer written in Python: its files are its content
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _texts_or_drop(form: TextForm, pair: Pair) -> PairTexts | RowDropped:
    try:
        return form.texts(pair)
    except RowDropped as dropped:
        return dropped


def _refusal(prompt: list[int], chosen: list[int], rejected: list[int], end: int | None) -> DropReason | None:
    bodies = [ids[:-1] if end is not None and ids[-1:] == [end] else ids for ids in (chosen, rejected)]
    if not prompt or not all(bodies):
        return DropReason.EMPTY
    # "Exactly one end-of-turn token": a second one inside would teach the model to go on after the end.
    if end is not None and any(end in body for body in bodies):
        return DropReason.END_INSIDE
    return DropReason.IDENTICAL if chosen == rejected else None


def _runs_together(prompt: str, completion: str) -> bool:
    """Two ASCII characters meet without whitespace: "2+2?" + "Four". (Chinese needs none.)"""
    border = prompt[-1:] + completion[:1]
    return len(border) == 2 and border.isascii() and not any(c.isspace() for c in border)
