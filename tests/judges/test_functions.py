"""A person's function as a judge: found, told apart by its arguments, and refused when it does not answer."""

from pathlib import Path

import numpy as np
import pytest

from prefopt_ray.errors import JudgeError
from prefopt_ray.judges.base import Prompt, is_pointwise, silent
from prefopt_ray.judges.functions import check_function, open_function
from prefopt_ray.train.scorers import Completion

PROMPTS = [Prompt("one"), Prompt("two")]
SAID = [Completion("a", 1, finished=True), Completion("bbb", 3, finished=False)]
MODULE = """
def length(prompts, completions):
    return [len(c.text) - 10 * (not c.finished) for c in completions]

def longer(prompts, first, second, margin=0):
    return [1.0 if len(a.text) > len(b.text) + margin else 0.0 for a, b in zip(first, second)]

class Judge:
    def score(self, prompts, completions):
        return [1.0] * len(prompts)

judge = Judge()

def one(prompts): return []
def short(prompts, completions): return [1.0]
def words(prompts, completions): return ["good"] * len(prompts)
def infinite(prompts, completions): return [float("inf")] * len(prompts)
def raises(prompts, completions): raise RuntimeError("no model today")
def raises_below(prompts, completions): return __import__("json").loads("{")
def beyond(prompts, first, second): return [2.0] * len(prompts)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "my_judges.py").write_text(MODULE)
    return tmp_path / "my_judges.py"


def test_two_arguments_score_and_three_compare(file: Path) -> None:
    length, longer = open_function(f"{file}:length"), open_function(f"{file}:longer")
    assert is_pointwise(length) and not is_pointwise(longer)
    assert length.score(PROMPTS, SAID, advance=silent).tolist() == [1, -7]
    assert longer.prefer(PROMPTS, SAID, SAID[::-1], advance=silent).shares.tolist() == [0, 1]


def test_a_method_of_an_object_is_a_function(file: Path) -> None:
    assert open_function(f"{file}:judge.score").score(PROMPTS, SAID, advance=silent).tolist() == [1, 1]


def test_a_module_in_the_current_folder_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert np.isfinite(open_function("my_judges:length").score(PROMPTS, SAID, advance=silent)).all()


@pytest.mark.parametrize(("name", "found"), [
    ("no_such", "AttributeError"), ("one", "1 required arguments"), ("__name__", "no function"),
])
def test_what_is_no_judge_is_refused_with_the_two_forms(file: Path, name: str, found: str) -> None:
    with pytest.raises(JudgeError, match=f"my_judges.py:{name}.*{found}"):
        open_function(f"{file}:{name}")


@pytest.mark.parametrize("place", ["/no/such/file.py:f", "no_such_module:f"])
def test_what_cannot_be_imported_is_named(place: str) -> None:
    with pytest.raises(JudgeError, match=f"{place}.*cannot be imported"):
        open_function(place)


@pytest.mark.parametrize(("name", "rule"), [
    ("short", "one number per prompt"), ("words", "must return numbers"), ("infinite", "2 of 2.*finite"),
    ("raises", "no model today"),
])
def test_answers_that_are_no_scores_are_refused(file: Path, name: str, rule: str) -> None:
    with pytest.raises(JudgeError, match=rule):
        open_function(f"{file}:{name}").score(PROMPTS, SAID, advance=silent)


def test_an_answer_that_is_no_number_is_shown_by_its_first_wrong_value(file: Path) -> None:
    with pytest.raises(JudgeError, match=r"got 'good'; must return numbers"):
        open_function(f"{file}:words").score(PROMPTS, SAID, advance=silent)


def test_a_missing_function_names_the_file_and_no_module_of_ours(file: Path) -> None:
    with pytest.raises(JudgeError) as caught:
        open_function(f"{file}:nope")
    assert f"module '{file}' has no attribute 'nope'" in str(caught.value)
    assert "prefopt_judge" not in str(caught.value)


def test_the_check_asks_the_function_and_names_the_line_where_it_raised(file: Path) -> None:
    for name in ("length", "longer", "judge.score"):
        check_function(f"{file}:{name}")
    for name in ("raises", "raises_below"):
        with pytest.raises(JudgeError, match=rf"the judge raised at my_judges\.py:{line_of(name)}"):
            check_function(f"{file}:{name}")
    with pytest.raises(JudgeError, match="between 0 and 1"):
        check_function(f"{file}:beyond")


def test_a_file_that_raises_while_it_is_imported_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import json\n\njson.loads('{')\n")
    with pytest.raises(JudgeError, match=r"cannot be imported at broken\.py:3"):
        open_function(f"{tmp_path / 'broken.py'}:f")


def line_of(function: str) -> int:
    return next(number for number, line in enumerate(MODULE.splitlines(), 1) if f"def {function}(" in line)


def test_preferences_lie_between_0_and_1(file: Path) -> None:
    with pytest.raises(JudgeError, match="2;.*between 0 and 1"):
        open_function(f"{file}:beyond").prefer(PROMPTS, SAID, SAID, advance=silent)
