"""What judges read: the rows' own prompts, in the order of the pairs, and completions that are stored once."""

import json
from pathlib import Path

import pytest

from prefopt_ray.errors import SweepError
from prefopt_ray.judges.base import Prompt
from prefopt_ray.judges.completions import (
    Sampled,
    Sampling,
    completions_file,
    shared_prompts,
    stored_completions,
    write_completions,
)
from prefopt_ray.judges.prompts import read_prompts
from prefopt_ray.pairs.config import PairsConfig, PartConfig, SourceConfig
from prefopt_ray.pairs.shapes import Message
from prefopt_ray.train.scorers import Completion

ROWS = (
    {"prompt": "first?", "chosen": "a", "rejected": "b"},
    {"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "second?"}],
     "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]},
    {"prompt": "\n\nHuman: third?\n\nAssistant:", "chosen": " a", "rejected": " b"},
)
SAMPLING = Sampling("0001", 80, 5, 16, 3)
SAMPLED = Sampled(
    SAMPLING, (Prompt("one"), Prompt("two", (Message("user", "two"),)), Prompt("drei\u2028?")),
    (Completion("a\nb", 2, finished=True), Completion("", 0, finished=False), Completion("你好", 2, finished=True)),
)


def config(text: str) -> PairsConfig:
    source = SourceConfig("made", rows=ROWS)
    return PairsConfig(train=PartConfig(source), select=PartConfig(None, 1), test=PartConfig(source), text=text)


def test_prompts_come_in_the_order_of_the_pairs_as_conversations() -> None:
    third, second, first = read_prompts(config("template"), "test", [2, 1, 0])
    assert first == Prompt("first?", (Message("user", "first?"),))
    assert second.text == "System: be brief\n\nUser: second?"
    assert second.turns == (Message("system", "be brief"), Message("user", "second?"))
    assert third.turns == (Message("user", "third?"),)


def test_plain_text_stays_text() -> None:
    (first,) = read_prompts(config("plain"), "test", [0])
    assert first == Prompt("first?")


def test_stored_completions_are_what_was_said(tmp_path: Path) -> None:
    write_completions(tmp_path, SAMPLED)
    assert stored_completions(tmp_path, SAMPLING) == SAMPLED


def test_fewer_prompts_are_the_first_ones_and_more_are_drawn_anew(tmp_path: Path) -> None:
    write_completions(tmp_path, SAMPLED)
    fewer = Sampling("0001", 80, 5, 16, 2)
    assert stored_completions(tmp_path, fewer).completions == SAMPLED.completions[:2]
    assert stored_completions(tmp_path, Sampling("0001", 80, 5, 16, 4)) is None


@pytest.mark.parametrize("other", [
    Sampling("0001", 40, 5, 16, 3), Sampling("0001", 80, 6, 16, 3), Sampling("0001", 80, 5, 8, 3),
    Sampling("0002", 80, 5, 16, 3),
])
def test_another_step_seed_or_length_is_not_the_same(tmp_path: Path, other: Sampling) -> None:
    write_completions(tmp_path, SAMPLED)
    assert stored_completions(tmp_path, other) is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_completions(tmp_path, SAMPLED)
    path = completions_file(tmp_path, "0001")
    path.write_text(path.read_text() + json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(SweepError, match="completions-0001.jsonl.*sampled again"):
        stored_completions(tmp_path, SAMPLING)


def test_competitors_must_have_answered_the_same_prompts() -> None:
    other = Sampled(Sampling("0002", 80, 5, 16, 3), SAMPLED.prompts[::-1], SAMPLED.completions)
    assert shared_prompts([SAMPLED, SAMPLED]) == SAMPLED.prompts
    with pytest.raises(SweepError, match="0001 and 0002.*different prompts"):
        shared_prompts([SAMPLED, other])
