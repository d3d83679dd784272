"""A person's own Python function as a judge, and the gold reward as one.

`f(prompts, completions)` returns scores, `f(prompts, first, second)` returns shares in [0, 1] with which the first is
better: the number of arguments says which it is. Prompts are texts, completions have `.text`, `.tokens` and
`.finished`. Knows nothing of models or files beside the function's own.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from prefopt_ray.errors import JudgeError, Problem
from prefopt_ray.gold.scorer import GoldScorer
from prefopt_ray.judges.base import Advance, Preferences, Prompt, silent
from prefopt_ray.train.scorers import Completion

Function = Callable[..., Any]

# What the check asks about: letters, which the embedded task's reward can read too.
_TRIED = (Prompt("a b c d"), Prompt("e f g h"))
_ANSWERS = (Completion("i j k l m", 5, finished=True), Completion("n o p", 3, finished=False))


def open_function(written: str) -> "FunctionScores | FunctionPreferences":
    """The judge of `package.module:function` or `FILE.py:function`.

    Modules are looked for in the current folder too. Raises JudgeError when it cannot be imported or takes neither
    two nor three arguments.
    """
    place, _, path = written.rpartition(":")
    try:
        found: Any = _module(place)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:  # noqa: BLE001 - a stranger's module may raise anything while it is imported
        fix = "name a module that Python can import from here, or a file: judges.py:score"
        said = f"{type(error).__name__}: {error}".replace(_own_name(Path(place)), place)
        rule = f"cannot be imported{_line_in(os.path.abspath(place), error)}"
        raise JudgeError(_problem(written, said, rule, fix)) from error
    arguments = _required_arguments(found)
    if arguments == 2:
        return FunctionScores(function_name(written), found)
    if arguments == 3:
        return FunctionPreferences(function_name(written), found)
    raise JudgeError(_problem(
        written, "no function" if arguments is None else f"{arguments} required arguments",
        "must take (prompts, completions) and return scores, or (prompts, first, second) and return preferences",
        "give further arguments defaults",
    ))


def check_function(written: str) -> None:
    """Import it and ask it once about two made-up prompts. Raises JudgeError."""
    judge = open_function(written)
    if isinstance(judge, FunctionScores):
        judge.score(_TRIED, _ANSWERS, advance=silent)
    else:
        judge.prefer(_TRIED, _ANSWERS, _ANSWERS[::-1], advance=silent)


def function_name(written: str) -> str:
    """`judges.py:score` of a file somewhere; a module's function as it is written."""
    place, _, path = written.rpartition(":")
    return f"{Path(place).name}:{path}" if place.endswith(".py") else written


@dataclass(frozen=True)
class FunctionScores:
    """A pointwise judge."""

    name: str
    function: Function

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], *, advance: Advance) -> np.ndarray:
        given = _called(self.name, self.function, [prompt.text for prompt in prompts], list(completions))
        scores = _numbers(self.name, given, len(prompts))
        advance(len(prompts))
        return scores


@dataclass(frozen=True)
class FunctionPreferences:
    """A pairwise judge."""

    name: str
    function: Function

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], *, advance: Advance
    ) -> Preferences:
        given = _called(self.name, self.function, [prompt.text for prompt in prompts], list(first), list(second))
        shares = _numbers(self.name, given, len(prompts))
        if ((shares < 0) | (shares > 1)).any():
            found = f"{shares[(shares < 0) | (shares > 1)][0]:g}"
            rule, fix = "preferences must be between 0 and 1", "return P(first is better)"
            raise JudgeError(_problem(self.name, found, rule, fix))
        advance(len(prompts))
        return Preferences(shares)


@dataclass(frozen=True)
class GoldJudge:
    """The embedded task's true reward."""

    name: str = "gold"

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], *, advance: Advance) -> np.ndarray:
        scores = GoldScorer().score([prompt.text for prompt in prompts], completions)
        advance(len(prompts))
        return scores


def _module(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _module_of_file(Path(place))
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the installed `prefopt` command does not look there
    return importlib.import_module(place)


def _module_of_file(file: Path) -> ModuleType:
    """Under a name of its own, so that a judges.py hides no other module."""
    name = _own_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    spec.loader.exec_module(module)
    return module


def _own_name(file: Path) -> str:
    return f"prefopt_judge_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"


def _required_arguments(found: Any) -> int | None:
    """None for what cannot be called or has no signature."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _called(name: str, function: Function, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        module = sys.modules.get(getattr(function, "__module__", ""))
        rule = f"the judge raised{_line_in(getattr(module, '__file__', None), error)}"
        raise JudgeError(_problem(name, f"{type(error).__name__}: {error}", rule, "")) from error


def _line_in(file: str | None, error: Exception) -> str:
    """` at judges.py:12`, the last line of that file on the way to the error; empty where it was never there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" at {Path(file).name}:{lines[-1]}" if lines else ""


def _numbers(name: str, given: Any, count: int) -> np.ndarray:
    """(count,) finite float64. Raises JudgeError."""
    try:
        numbers = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise JudgeError(_problem(name, repr(_no_number(given))[:80], "must return numbers", "")) from error
    if numbers.shape != (count,):
        raise JudgeError(_problem(name, f"shape {numbers.shape}", f"must return one number per prompt, ({count},)", ""))
    if not np.isfinite(numbers).all():
        found = f"{int((~np.isfinite(numbers)).sum())} of {count}"
        raise JudgeError(_problem(name, found, "must return finite numbers", ""))
    return numbers


def _no_number(given: Any) -> Any:
    """The first value that is none, or all of it where it is no list."""
    for value in given if isinstance(given, list | tuple) else ():
        try:
            float(value)
        except (TypeError, ValueError):
            return value
    return given


def _problem(name: str, found: str, rule: str, fix: str) -> Problem:
    return Problem(name, "judge.callable", found, rule, fix)
