"""The embedded bandit: three actions, no context, a policy that is one softmax over three free numbers.

What preference losses do is known here in closed form, so their claims can be checked to the last digit: the bandits
of the IPO paper (section 5.4 of arXiv:2310.12036). Prompts are numbers that the policy does not read; they are there
because parts of the data must not share a prompt. Importing this module makes its folders loadable by transformers'
auto classes; `prepare` imports it, so they load in every worker.
"""

from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from prefopt_ray.errors import DataError, Problem
from prefopt_ray.gold.base import appearing_whole
from prefopt_ray.train.evaluations import EvaluationLog

ACTIONS: tuple[str, ...] = ("a", "b", "c")
COMPARISONS: dict[str, tuple[str, ...]] = {  # winner, loser; D1 to D3 are the paper's
    "total_order": ("ab", "bc", "ac"),  # D1
    "cycle": ("ab", "bc", "ca"),  # D2
    "contradiction": ("ab", "ba"),  # D3 as printed: c is never compared, so nothing moves it
    "chain": ("ab", "bc"),  # D3 as described: two observed preferences, (a, c) unobserved
    "never_wins": ("ab", "ba", "ac", "bc"),  # a and b are even, c loses to both
}
PARTS: tuple[str, ...] = ("train", "select", "test")

_DIGITS = tuple("0123456789")
_BOS, _SEP, _EOS, _PAD = "<s>", ">", "</s>", "<pad>"
_VOCABULARY = (*ACTIONS, *_DIGITS, _BOS, _SEP, _EOS, _PAD)
_TOKEN_IDS = {word: index for index, word in enumerate(_VOCABULARY)}
_IMPOSSIBLE = -1e4  # as a logit: its probability, and so its gradient, is exactly zero in float32 and float64
_NUMBER_DIGITS = 5


def bandit_rows(comparisons: str, *, part: str, pairs: int | None = None) -> list[dict[str, str]]:
    """Rows {prompt, chosen, rejected} such as "0 0 0 0 0 2 >", " a", " c": the comparisons in turn, each with a prompt
    of its own that no other part has. `pairs` None = every comparison once.

    Raises DataError for an unknown set of comparisons.
    """
    if comparisons not in COMPARISONS:
        raise DataError(
            Problem("bandit", "split", repr(comparisons), f"must name the comparisons: {', '.join(COMPARISONS)}")
        )
    observed = COMPARISONS[comparisons]
    wanted = islice(cycle(observed), pairs or len(observed))
    return [
        {"prompt": _prompt(PARTS.index(part), number), "chosen": f" {winner}", "rejected": f" {loser}"}
        for number, (winner, loser) in enumerate(wanted)
    ]


def ensure_bandit(cache: Path) -> Path:
    """The policy's folder `cache/bandit`, written if it is not there yet: uniform over the actions."""
    folder = Path(cache) / "bandit"
    if not folder.is_dir():
        with appearing_whole(folder) as building:
            BanditPolicy(BanditConfig()).save_pretrained(building)
            bandit_tokenizer().save_pretrained(building)
    return folder


def bandit_policies(log: EvaluationLog, comparisons: str) -> dict[int, np.ndarray]:
    """Probabilities of the actions (3,) at each evaluation of a trial; NaN = never compared.

    Rows are the comparisons in turn, so a row's number names its actions.
    """
    observed, policies = COMPARISONS[comparisons], {}
    for step in log.steps("select"):
        stats, policy = log.stats("select", step), np.full(len(ACTIONS), np.nan)
        probabilities = np.exp(np.stack([stats.policy_chosen.numpy(), stats.policy_rejected.numpy()]))  # (2, N)
        for row, (chosen, rejected) in zip(log.row_ids("select"), probabilities.T, strict=True):
            winner, loser = observed[row % len(observed)]
            policy[ACTIONS.index(winner)], policy[ACTIONS.index(loser)] = chosen, rejected
        policies[step] = policy
    return policies


def bandit_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `"0 0 0 0 0 2 >"` -> BOS, six digits, SEP."""
    tokenizer = Tokenizer(models.WordLevel(_TOKEN_IDS))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, _TOKEN_IDS[_BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD,
        padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip


class BanditConfig(PreTrainedConfig):
    """Nothing to choose: the vocabulary is fixed."""

    model_type = "prefopt-bandit"

    def __init__(self, **kwargs: object) -> None:
        fixed = {"bos_token_id": _TOKEN_IDS[_BOS], "eos_token_id": _TOKEN_IDS[_EOS], "pad_token_id": _TOKEN_IDS[_PAD]}
        super().__init__(**{**fixed, "tie_word_embeddings": False, **kwargs})
        self.vocab_size, self.hidden_size = len(_VOCABULARY), 2
        self.num_hidden_layers = self.num_attention_heads = 1  # `generate` makes a cache for them, which stays empty


class BanditStates(nn.Module):
    """The decoder: (1, 0) before an action was taken, (0, 1) right after one. Nothing in it is trained."""

    def forward(self, input_ids: Tensor, **ignored: object) -> BaseModelOutput:
        """input_ids (B, T) -> states (B, T, 2)."""
        acted = input_ids < len(ACTIONS)
        return BaseModelOutput(last_hidden_state=functional.one_hot(acted.long(), 2).float())


class BanditPolicy(PreTrainedModel, GenerationMixin):
    """softmax(theta) over the actions, then EOS with certainty: a completion's log-prob is log softmax(theta)[action].

    theta is the head's first column on the action rows. All other weights of the head stand for impossible tokens or
    for the certain EOS; their gradients are exactly zero, so training every weight trains theta alone.
    """

    config_class = BanditConfig
    _supports_sdpa = True  # there is no attention: every implementation computes it

    def __init__(self, config: BanditConfig) -> None:
        super().__init__(config)
        self.model = BanditStates()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **ignored: object) -> CausalLMOutput:
        """input_ids (B, T) -> logits (B, T, V)."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.lm_head  # nothing is embedded; asked for the number of its rows, the vocabulary

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: object
    ) -> dict[str, Tensor]:
        return {"input_ids": input_ids}  # the whole row each time: there is nothing to cache

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.lm_head:
            with torch.no_grad():
                module.weight.fill_(_IMPOSSIBLE)
                module.weight[: len(ACTIONS), 0] = 0.0
                module.weight[_TOKEN_IDS[_EOS], 1] = 0.0


def _prompt(part: int, number: int) -> str:
    return " ".join([str(part), *f"{number:0{_NUMBER_DIGITS}d}", _SEP])


AutoConfig.register(BanditConfig.model_type, BanditConfig, exist_ok=True)
AutoModelForCausalLM.register(BanditConfig, BanditPolicy, exist_ok=True)
