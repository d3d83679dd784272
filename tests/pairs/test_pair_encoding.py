"""Texts and token ids: one BOS, one end of turn, one prompt. Oracle: the template's own text, decoded back."""

import re

import pytest
from transformers import PreTrainedTokenizerFast

from prefopt_ray.errors import DataError
from prefopt_ray.pairs.encode import EncodedPair, Encoder
from prefopt_ray.pairs.shapes import DropReason, Message, Pair, RowDropped
from prefopt_ray.pairs.texts import open_text_form

QUESTION = (Message("user", "What is 2+2?"),)
MULTI_TURN = (Message("user", "Hello"), Message("assistant", "I'm fine."), Message("user", "你好，世界"))
WITH_SYSTEM = (Message("system", "You are a helpful assistant."), *QUESTION)


def pair(prompt: str | tuple[Message, ...], chosen: str, rejected: str = "I would love to.") -> Pair:
    return Pair(0, "test row 0", prompt, chosen, rejected)


def encode(tokenizer: PreTrainedTokenizerFast, text: str, pair: Pair, max_tokens: int = 10_000) -> EncodedPair:
    result = try_encode(tokenizer, text, pair, max_tokens)
    assert isinstance(result, EncodedPair)
    return result


def try_encode(tokenizer, text: str, pair: Pair, max_tokens: int = 10_000) -> EncodedPair | RowDropped:
    return Encoder(tokenizer, open_text_form(text, tokenizer), max_tokens).encode([pair])[0]


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def template_text(tokenizer, messages: tuple[Message, ...], **options) -> str:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)


@pytest.mark.parametrize("prompt", [QUESTION, MULTI_TURN, WITH_SYSTEM], ids=["one turn", "multi-turn", "system"])
@pytest.mark.parametrize("template", ["chatml", "llama3", "zephyr", "llama2", "empty_thought"])
def test_prompt_and_completion_are_the_templates_own_text_up_to_the_end_of_turn(make_tokenizer, template, prompt):
    tokenizer = make_tokenizer(template)
    encoded = encode(tokenizer, "template", pair(prompt, "The answer is 46."))
    whole = template_text(tokenizer, (*prompt, Message("assistant", "The answer is 46.")))
    assert decode(tokenizer, encoded.prompt + encoded.chosen) == whole.rstrip("\n")
    assert decode(tokenizer, encoded.prompt) == template_text(tokenizer, prompt, add_generation_prompt=True)


def test_a_completion_ends_with_exactly_one_end_of_turn_token(make_tokenizer, ending_template):
    template, end = ending_template
    tokenizer = make_tokenizer(template)
    end_id = tokenizer.convert_tokens_to_ids(end)
    encoded = encode(tokenizer, "template", pair(QUESTION, "Fine.\n", f"Good.{end}"))
    for completion in (encoded.chosen, encoded.rejected):
        assert completion[-1] == end_id
        assert completion.count(end_id) == 1


def test_a_template_without_end_of_turn_gets_eos_once_and_a_warning(make_tokenizer):
    tokenizer = make_tokenizer("without_end")
    encoded = encode(tokenizer, "template", pair(QUESTION, "Fine.", "Good."))
    assert decode(tokenizer, encoded.prompt + encoded.chosen) == "user: What is 2+2?\nassistant: Fine.\n</s>"
    assert "no end-of-turn token" in open_text_form("template", tokenizer).warnings[0]


def test_a_tokenizer_without_eos_ends_completions_without_one(make_tokenizer):
    tokenizer = make_tokenizer(eos=None)
    encoded = encode(tokenizer, "plain", pair("Q: ", "A", "B"))
    assert decode(tokenizer, encoded.chosen) == "A"
    assert open_text_form("plain", tokenizer).warnings


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", ["llama3", "chatml"])
def test_bos_comes_once_from_template_or_tokenizer_or_both_and_never_otherwise(make_tokenizer, template, adds_bos):
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    encoded = encode(tokenizer, "template", pair(QUESTION, "Fine."))
    bos = tokenizer.bos_token_id
    expected = 1 if adds_bos or template == "llama3" else 0
    assert (encoded.prompt + encoded.chosen).count(bos) == expected
    assert encoded.prompt[:1].count(bos) == expected


def test_a_tokenizer_without_bos_gets_none(make_tokenizer):
    encoded = encode(make_tokenizer("chatml", bos=None), "template", pair(QUESTION, "Fine."))
    assert encoded.prompt[0] == make_tokenizer().convert_tokens_to_ids("<|im_start|>")


def test_a_plain_text_that_brings_bos_and_eos_has_them_once(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    encoded = encode(tokenizer, "plain", pair("<s>Answer: ", "46</s>", "47 </s></s>"))
    assert decode(tokenizer, encoded.prompt + encoded.chosen) == "<s>Answer: 46</s>"
    assert decode(tokenizer, encoded.prompt + encoded.rejected) == "<s>Answer: 47 </s>"


@pytest.mark.parametrize("backend", ["byte_level", "metaspace"])
@pytest.mark.parametrize("prompt", ["Answer: ", "It costs $", "What", "Answer:"])
def test_prompt_ids_are_those_seen_at_generation_whatever_the_completion(make_tokenizer, backend, prompt):
    tokenizer = make_tokenizer(backend=backend, adds_bos=True)
    encoded = encode(tokenizer, "plain", pair(prompt, "46", " is love"))
    assert encoded.prompt == tokenizer(prompt)["input_ids"]


def test_a_merge_across_the_border_is_counted_and_keeps_the_text(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, "plain", pair("Answer: ", "46", "love"))
    joint = tokenizer("Answer: 46")["input_ids"]
    assert joint[: len(encoded.prompt)] != encoded.prompt  # the case is what it claims to be
    assert encoded.merges_at_border
    assert decode(tokenizer, encoded.prompt + encoded.chosen) == "Answer: 46</s>"
    assert not encode(tokenizer, "plain", pair("Answer:", " 46", " love")).merges_at_border


def test_completions_after_a_prompt_get_no_space_of_their_own(make_tokenizer):
    """Tokenised alone, a Llama-2-like tokenizer would put a space before "46"."""
    tokenizer = make_tokenizer(backend="metaspace", adds_bos=True)
    encoded = encode(tokenizer, "plain", pair("Answer:", "46", "love"))
    assert encoded.prompt + encoded.chosen[:-1] == tokenizer("Answer:46")["input_ids"]
    merging = encode(tokenizer, "plain", pair("It is $", "46", "love"))
    assert merging.merges_at_border
    assert decode(tokenizer, merging.prompt + merging.chosen).endswith("It is $46</s>")


def test_a_template_that_refuses_system_turns_gets_them_in_the_first_human_turn(make_tokenizer):
    tokenizer = make_tokenizer("gemma")
    encoded = encode(tokenizer, "template", pair(WITH_SYSTEM, "Fine."))
    assert decode(tokenizer, encoded.prompt) == (
        "<s><start_of_turn>user\nYou are a helpful assistant.\n\nWhat is 2+2?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "system" in open_text_form("template", tokenizer).warnings[0]


def test_a_conversation_that_the_template_refuses_is_a_malformed_row_with_the_templates_words(make_tokenizer):
    twice = (Message("user", "Hello"), Message("user", "Hello?"))
    dropped = try_encode(make_tokenizer("gemma"), "template", pair(twice, "Fine."))
    assert isinstance(dropped, RowDropped) and dropped.reason is DropReason.MALFORMED
    assert "must alternate" in str(dropped.problem)


def test_a_generation_prompt_with_an_opened_thought_keeps_prompt_and_answer_whole(make_tokenizer):
    tokenizer = make_tokenizer("thinking")
    prompt = (Message("user", "Hello"), Message("assistant", "<think>so</think>Hi"), Message("user", "And?"))
    encoded = encode(tokenizer, "template", pair(prompt, "<think>\nI am</think>Fine.", "Good."))
    opened = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert decode(tokenizer, encoded.prompt + encoded.chosen) == opened + "I am</think>Fine.<|im_end|>"
    assert decode(tokenizer, encoded.prompt + encoded.rejected) == opened + "Good.<|im_end|>"


def test_messages_in_plain_text_read_as_human_and_assistant(make_tokenizer):
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, "plain", pair((WITH_SYSTEM[0], *MULTI_TURN), "The sea"))
    assert decode(tokenizer, encoded.prompt + encoded.chosen) == (
        "\n\nSystem: You are a helpful assistant.\n\nHuman: Hello\n\nAssistant: I'm fine.\n\nHuman: 你好，世界"
        "\n\nAssistant: The sea</s>"
    )


def test_an_hh_dialogue_stays_as_it_is_in_plain_text_and_becomes_turns_in_a_template(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    dialogue = pair("\n\nHuman: Hello\n\nAssistant: I'm\n\nHuman: And?\n\nAssistant:", " Fine.", " Good. ")
    plain = encode(tokenizer, "plain", dialogue)
    assert decode(tokenizer, plain.prompt + plain.chosen) == dialogue.prompt + " Fine.</s>"
    templated = encode(tokenizer, "template", dialogue)
    turns = (Message("user", "Hello"), Message("assistant", "I'm"),
             Message("user", "And?"), Message("assistant", "Good."))
    assert decode(tokenizer, templated.prompt + templated.rejected) == template_text(tokenizer, turns).rstrip("\n")


def test_an_end_of_turn_token_inside_a_completion_drops_the_pair(make_tokenizer):
    dropped = try_encode(make_tokenizer("chatml"), "template", pair(QUESTION, "a<|im_end|>b"))
    assert isinstance(dropped, RowDropped) and dropped.reason is DropReason.END_INSIDE


def test_completions_that_differ_only_in_what_the_template_strips_are_identical(make_tokenizer):
    dropped = try_encode(make_tokenizer("llama3"), "template", pair(QUESTION, "Fine.", "Fine.  "))
    assert isinstance(dropped, RowDropped) and dropped.reason is DropReason.IDENTICAL


def test_a_cut_completion_has_no_end_of_turn_and_identical_cuts_drop_the_pair(make_tokenizer):
    tokenizer = make_tokenizer(backend="words")
    long = "a b c d e f g h i j k l"
    cut = encode(tokenizer, "plain", pair("the sea", f"is {long}", "and"), max_tokens=8)
    assert len(cut.prompt) + len(cut.chosen) == 8 and tokenizer.eos_token_id not in cut.chosen
    assert cut.rejected[-1] == tokenizer.eos_token_id and cut.completions_cut == 1
    dropped = try_encode(tokenizer, "plain", pair("the sea", f"{long} the", f"{long} sea"), max_tokens=8)
    assert isinstance(dropped, RowDropped) and dropped.reason is DropReason.IDENTICAL_AFTER_CUT


def test_a_jinja_file_is_used_as_the_template(make_tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
                    "{% if add_generation_prompt %}[assistant]{% endif %}")
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, str(path), pair(QUESTION, "Fine."))
    assert decode(tokenizer, encoded.prompt + encoded.chosen) == "[user]What is 2+2?</s>[assistant]Fine.</s>"


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{{ raise_exception('today') }}{% endif %}{{ date_string }}"
        "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    assert decode(tokenizer, encode(tokenizer, "template", pair(QUESTION, "Fine.")).prompt).startswith("26 Jul 2024")


@pytest.mark.parametrize(
    ("template", "fragment"),
    [("{% for m in messages %}", "is not jinja"), ("{{ raise_exception('never') }}", "never"),
     ("no messages at all", "does not write the assistant's text")],
)
def test_a_template_that_cannot_work_is_refused_before_any_row(make_tokenizer, tmp_path, template, fragment):
    path = tmp_path / "bad.jinja"
    path.write_text(template)
    with pytest.raises(DataError, match=re.escape(fragment)):
        open_text_form(str(path), make_tokenizer())


def test_a_missing_template_names_the_other_text_forms(make_tokenizer):
    with pytest.raises(DataError, match="text: plain"):
        open_text_form("template", make_tokenizer())
    with pytest.raises(DataError, match="must be template, plain, or an existing FILE.jinja"):
        open_text_form("tempalte", make_tokenizer())
