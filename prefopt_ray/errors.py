"""The errors a person can meet: what is wrong, where, what was found, how to fix it.

Every class is picklable (all state lives in `args`), because errors cross Ray's process borders.
Exit codes: 2 = the input is wrong, 1 = the work failed.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One finding: `place` is a file with a line or row, `key` the dotted key or column."""

    place: str
    key: str
    found: str
    rule: str
    fix: str = ""

    def __str__(self) -> str:
        subject = " ".join(part for part in (self.place, self.key) if part)
        found = f"got {self.found}; " if self.found else ""
        fix = f" ({self.fix})" if self.fix else ""
        return f"{subject}: {found}{self.rule}{fix}"


class PrefoptError(Exception):
    """Something a person should read without a traceback."""

    exit_code = 1


class InputError(PrefoptError):
    """The input is wrong: one or many problems, reported all at once."""

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[Problem, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.args)


class SpecError(InputError):
    """The YAML spec, or a `--set`, is wrong."""


class DataError(InputError):
    """A data file, a row, or the pairs made from them are wrong."""


class ModelError(InputError):
    """A model, tokenizer or adapter cannot be loaded or does not fit."""


class ResourceError(InputError):
    """The machine or cluster can never give what the spec asks for."""


class ClusterError(InputError):
    """A cluster does not answer, does not take the token, or cannot run the sweep."""


class SweepError(InputError):
    """A sweep folder is missing, unreadable, or not what the command needs."""


class JudgeError(InputError):
    """A judge cannot be loaded or reached, or does not answer as a judge."""


class CheckpointError(PrefoptError):
    """A checkpoint is torn or corrupt (its hash does not match its manifest)."""


def printable(text: str) -> str:
    """What was found may hold a terminal's escape codes: they are shown, not obeyed."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
