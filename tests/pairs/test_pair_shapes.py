"""Every shape of preference data gives the same pair. Oracle: the pair written out by hand."""

import pytest

from prefopt_ray.errors import DataError
from prefopt_ray.pairs.rows import Row
from prefopt_ray.pairs.shapes import DropReason, Message, Pair, RowDropped, dialogue_turns, find_columns, read_pair

ASK = "What is 2+2?"
USER = {"role": "user", "content": ASK}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
HH = "\n\nHuman: What is 2+2?\n\nAssistant:"


def read(values: dict, **overrides: str) -> Pair:
    row = Row(7, "rows.jsonl:8", values)
    return read_pair(row, find_columns([row], overrides, "rows.jsonl"))


def reason(values: dict, **overrides: str) -> DropReason:
    with pytest.raises(RowDropped) as dropped:
        read(values, **overrides)
    return dropped.value.reason


ONE_QUESTION = {
    "prompt list, message answers": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "prompt list, one-message lists": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt list, text answers": {"prompt": [USER], "chosen": "4", "rejected": "5"},
    "prompt list, whole conversations": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ultrafeedback: prompt text, whole conversations": {
        "prompt": ASK, "prompt_id": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD],
        "messages": [USER, GOOD], "score_chosen": 8.0, "score_rejected": 3.0,
    },
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "sharegpt": {"conversations": [{"from": "human", "value": ASK}],
                 "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
    "content in parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": ASK}]}],
                         "chosen": [GOOD], "rejected": [BAD]},
    "prompt text, message answers": {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]},
}


@pytest.mark.parametrize("shape", ONE_QUESTION)
def test_every_shape_of_one_question_is_the_same_pair(shape):
    assert read(ONE_QUESTION[shape]) == Pair(7, "rows.jsonl:8", (Message("user", ASK),), "4", "5")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": ASK, "chosen": "4", "rejected": "5"},
        {"instruction": ASK, "input": "", "chosen": "4", "rejected": "5"},
        {"question": ASK, "chosen": "4", "rejected": "5", "chosen-rating": 5},
        {"instruction": ASK, "chosen_response": "4", "rejected_response": "5"},
        {"input": ASK, "system": "", "chosen": "4", "rejected": "5"},
    ],
)
def test_column_names_in_use_are_found_by_rule(values):
    assert read(values) == Pair(7, "rows.jsonl:8", ASK, "4", "5")


def test_columns_can_be_named():
    values = {"q": ASK, "good": "4", "bad": "5", "chosen": "no"}
    assert read(values, prompt="q", chosen="good", rejected="bad").chosen == "4"


def test_an_input_beside_an_instruction_belongs_to_the_prompt():
    assert read({"instruction": "Add", "input": "2 2", "chosen": "4", "rejected": "5"}).prompt == "Add\n2 2"


def test_a_system_column_becomes_the_first_turn_unless_there_is_one():
    system = Message("system", "Be brief.")
    values = {"system": "Be brief.", "prompt": ASK, "chosen": "4", "rejected": "5"}
    assert read(values).prompt == (system, Message("user", ASK))
    values["prompt"] = [{"role": "system", "content": "Be long."}, USER]
    assert read(values).prompt[0] == Message("system", "Be long.")


def test_multi_turn_system_and_chinese_turns_are_kept_in_order():
    turns = [{"from": "system", "value": "你是助手"}, {"from": "human", "value": "你好"},
             {"from": "gpt", "value": "您好"}, {"from": "human", "value": "二加二？"}]
    answers = {"chosen": {"from": "gpt", "value": "四"}, "rejected": {"from": "gpt", "value": "五"}}
    pair = read({"conversations": turns, **answers})
    assert [m.role for m in pair.prompt] == ["system", "user", "assistant", "user"]
    assert (pair.group, pair.chosen, pair.rejected) == ("你好", "四", "五")


def test_an_hh_dialogue_is_cut_at_the_last_assistant_not_at_the_common_prefix():
    pair = read({"chosen": HH + " I think 4", "rejected": HH + " I'm sorry"})
    assert (pair.prompt, pair.chosen, pair.rejected) == (HH, " I think 4", " I'm sorry")


def test_an_hh_dialogue_with_an_earlier_answer_keeps_it_in_the_prompt():
    first = HH + " 4\n\nHuman: Sure?\n\nAssistant:"
    pair = read({"chosen": first + " Yes", "rejected": first + " Yes!"})
    assert (pair.prompt, pair.chosen) == (first, " Yes")
    assert dialogue_turns(first) == (Message("user", ASK), Message("assistant", "4"), Message("user", "Sure?"))
    assert pair.group == ASK


def test_texts_that_repeat_an_explicit_dialogue_prompt_lose_it():
    pair = read({"prompt": HH, "chosen": HH + " 4", "rejected": HH + " 5"})
    assert (pair.prompt, pair.chosen) == (HH, " 4")
    assert read({"prompt": "The", "chosen": "The sea", "rejected": "The sky"}).chosen == "The sea"


def test_the_group_is_the_first_human_turn_with_whitespace_normalised():
    assert read({"prompt": " What\n is   2+2? ", "chosen": "4", "rejected": "5"}).group == ASK


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": ASK, "chosen": " \n", "rejected": "5"}, DropReason.EMPTY),
        ({"prompt": "", "chosen": "4", "rejected": "5"}, DropReason.EMPTY),
        ({"prompt": [], "chosen": "4", "rejected": "5"}, DropReason.EMPTY),
        ({"chosen": [], "rejected": [USER, BAD]}, DropReason.EMPTY),
        ({"chosen": HH + " ", "rejected": HH + " 5"}, DropReason.EMPTY),
        ({"prompt": ASK, "chosen": "4", "rejected": "4"}, DropReason.IDENTICAL),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, DropReason.IDENTICAL),
        ({"chosen": HH + " 4", "rejected": HH.replace("2+2", "2+3") + " 5"}, DropReason.DIFFERING_PROMPTS),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Hello"}, BAD]}, DropReason.DIFFERING_PROMPTS),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, DropReason.DIFFERING_PROMPTS),
        ({"prompt": "Hello", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, DropReason.DIFFERING_PROMPTS),
    ],
)
def test_unusable_pairs_say_why(values, expected):
    assert reason(values) is expected


def test_a_prompt_column_that_disagrees_can_be_ignored_by_naming_chosen():
    values = {"prompt": "id-17", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert read(values, prompt="chosen").prompt == (Message("user", ASK),)


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"prompt": ASK, "chosen": 4, "rejected": "5"}, "a number (4)"),
        ({"prompt": ASK, "chosen": None, "rejected": "5"}, "null"),
        ({"prompt": ASK, "chosen": "4", "rejected": [BAD]}, "the same form"),
        ({"prompt": ASK, "chosen": {"text": "4"}, "rejected": {"text": "5"}}, "`role` and `content`"),
        ({"prompt": ASK, "chosen": USER, "rejected": BAD}, "must be the assistant's"),
        ({"prompt": [{**USER, "role": "assistent"}], "chosen": "4", "rejected": "5"}, "did you mean 'assistant'"),
        ({"prompt": [USER, GOOD], "chosen": "4", "rejected": "5"}, "must not be the assistant's"),
        ({"prompt": [[USER]], "chosen": "4", "rejected": "5"}, "must be a message"),
        ({"prompt": ASK, "chosen": "\ud83d", "rejected": "5"}, "U+D83D"),
        ({"chosen": "4", "rejected": "5"}, "columns: {prompt: NAME}"),
        ({"chosen": HH + " 4\n\nHuman: Thanks", "rejected": HH + " 5"}, "must be the assistant's"),
    ],
)
def test_malformed_rows_say_place_what_was_found_and_the_rule(values, fragment):
    with pytest.raises(RowDropped) as dropped:
        read(values)
    assert dropped.value.reason is DropReason.MALFORMED
    assert fragment in str(dropped.value.problem) and "rows.jsonl:8" in str(dropped.value.problem)


def test_a_missing_or_misnamed_column_names_the_columns_found():
    with pytest.raises(DataError, match=r"rows.jsonl rejected: got the columns 'prompt', 'chosen', 'bad'; no column"):
        read({"prompt": ASK, "chosen": "4", "bad": "5"})
    with pytest.raises(DataError, match="did you mean 'good'"):
        read({"prompt": ASK, "good": "4", "rejected": "5"}, chosen="godo")
    with pytest.raises(DataError, match="must be one of prompt, chosen, rejected, system"):
        read({"prompt": ASK, "chosen": "4", "rejected": "5"}, answer="chosen")
