"""What policies said to the test prompts, on disk: a judge looks again without anything being generated again.

`judge/completions-<competitor>.jsonl`: one line on how it was sampled, then one line per prompt in the part's order.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.judges.base import Prompt
from prefopt_ray.pairs.shapes import Message
from prefopt_ray.train.scorers import Completion

FOLDER = "judge"  # in a sweep's folder


@dataclass(frozen=True)
class Sampling:
    """How a competitor's completions were drawn; equal settings give equal completions."""

    competitor: str  # trial id, or `reference`
    step: int  # 0 for the reference
    seed: int
    max_new_tokens: int
    wanted: int  # prompts asked for; fewer lines = the part has no more


@dataclass(frozen=True)
class Sampled:
    """One competitor's completions of the prompts."""

    sampling: Sampling
    prompts: tuple[Prompt, ...]
    completions: tuple[Completion, ...]

    def first(self, count: int) -> "Sampled":
        return Sampled(self.sampling, self.prompts[:count], self.completions[:count])


def completions_file(sweep: Path, competitor: str) -> Path:
    return sweep / FOLDER / f"completions-{competitor}.jsonl"


def write_completions(sweep: Path, sampled: Sampled) -> None:
    path = completions_file(sweep, sampled.sampling.competitor)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(sampled.sampling)) + "\n")
        for prompt, completion in zip(sampled.prompts, sampled.completions, strict=True):
            line = {"prompt": prompt.text, "turns": [asdict(turn) for turn in prompt.turns], **asdict(completion)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def stored_completions(sweep: Path, sampling: Sampling) -> Sampled | None:
    """What is stored, when it was sampled in this way for at least so many prompts. Raises SweepError for damage."""
    path = completions_file(sweep, sampling.competitor)
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
        head, *lines = (json.loads(line) for line in text.split("\n"))  # splitlines would cut at U+2028 in a text
        known = Sampling(**head)
        rows = [_row(line) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        problem = Problem(str(path), "", "", f"cannot be read ({error})", "remove it; it is sampled again")
        raise SweepError(problem) from error
    enough = known.wanted >= sampling.wanted
    same = (known.step, known.seed, known.max_new_tokens) == (sampling.step, sampling.seed, sampling.max_new_tokens)
    if not (enough and same):
        return None
    prompts, completions = zip(*rows, strict=True)
    return Sampled(known, prompts, completions).first(sampling.wanted)


def shared_prompts(samples: Sequence[Sampled]) -> tuple[Prompt, ...]:
    """The prompts that all of them answered. Raises SweepError when they were asked different ones."""
    for other in samples[1:]:
        if other.prompts != samples[0].prompts:
            names = f"{samples[0].sampling.competitor} and {other.sampling.competitor}"
            raise SweepError(Problem(FOLDER, "", names, "answered different prompts", "remove their completions files"))
    return samples[0].prompts


def _row(line: dict) -> tuple[Prompt, Completion]:
    prompt = Prompt(line["prompt"], tuple(Message(**turn) for turn in line["turns"]))
    return prompt, Completion(line["text"], line["tokens"], finished=line["finished"])
