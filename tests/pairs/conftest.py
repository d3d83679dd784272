"""Small tokenizers trained on the spot, with chat templates that imitate the families in use."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is 2+2? The answer is 46 dollars, $46. I am sorry, I would love to help you with that question.",
    "\n\nHuman: Hello, how are you?\n\nAssistant: I'm fine. You are a helpful assistant.\n\n\n",
    "system user assistant <think> </think> Answer: write a poem about the sea and the sky",
    "请提供一下对香港银行业的分析以及目前面临的挑战。你好，世界",
] * 20

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
              " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
             "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
             " + '<end_of_turn>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "without_end": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                   "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    # Llama 2: no generation prompt of its own, the turn's end follows a space
    "llama2": "{{ bos_token }}{% for m in messages %}"
              "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
              "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
              "{% else %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}{% endif %}{% endfor %}",
    # the generation prompt opens a thought that given answers do not have, and earlier thoughts are removed
    "thinking": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' +"
                " (m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'])"
                " + '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # a last answer gets an empty thought that the generation prompt does not have (Qwen3)
    "empty_thought": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' +"
                     " ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '') + m['content']"
                     " + '<|im_end|>\n' }}{% endfor %}"
                     "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "zephyr": "</s>",
        "llama2": "</s>", "thinking": "<|im_end|>", "empty_thought": "<|im_end|>"}

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def _byte_level() -> Tokenizer:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): spaces belong to the word after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """Llama 2 style: a text that starts a sequence gets a space in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _words() -> Tokenizer:
    """One token per word, split at whitespace."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return tokenizer


_BACKENDS = {"byte_level": _byte_level, "metaspace": _metaspace, "words": _words}


@pytest.fixture(scope="session")
def trained() -> dict[str, str]:
    return {name: make().to_str() for name, make in _BACKENDS.items()}


@pytest.fixture
def make_tokenizer(trained: dict[str, str]) -> MakeTokenizer:
    """make_tokenizer(template=None, backend="byte_level", adds_bos=False, bos="<s>", eos="</s>")"""

    def make(template: str | None = None, *, backend: str = "byte_level", adds_bos: bool = False,
             bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
        core = Tokenizer.from_str(trained[backend])
        if adds_bos:
            core.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))])
        special = {k: v for k, v in {"bos_token": bos, "eos_token": eos}.items() if v is not None}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
        if template is not None:
            tokenizer.chat_template = TEMPLATES[template]
        return tokenizer

    return make


@pytest.fixture(scope="session")
def plain_tokenizer(trained: dict[str, str]) -> PreTrainedTokenizerFast:
    """One for a whole property test, which takes no fixture made anew per test."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained["byte_level"]), eos_token="</s>")


@pytest.fixture(params=sorted(ENDS))
def ending_template(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(template name, the token that ends its turns)"""
    return request.param, ENDS[request.param]
