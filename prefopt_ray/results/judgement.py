"""What judges said about a sweep: who is judged, the stored results, and words for them.

Reads and writes the sweep's `judge/` folder; the ledger of a finished sweep stays as it is. Knows no judge, no model.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefopt_ray.results.answer import in_question
from prefopt_ray.results.configurations import Configuration
from prefopt_ray.errors import Problem, SweepError
from prefopt_ray.judges.base import Tally
from prefopt_ray.judges.completions import FOLDER
from prefopt_ray.judges.tournament import JudgedCompetitor, Tournament, agreeing_pairs
from prefopt_ray.results.ledger import SweepRecord


@dataclass(frozen=True)
class JudgedFinalist:
    """One configuration at the step that is judged, by its first seed's checkpoint."""

    trial_id: str
    step: int
    score: float  # by which the sweep ranks it
    baseline: bool
    label: str


@dataclass(frozen=True)
class Judgement:
    """One judge's word on a sweep. Without a tournament, `problem` says why."""

    judge: str
    finalists: tuple[JudgedFinalist, ...]  # in the answer's order
    tournament: Tournament | None = None
    problem: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # the spec's judge section

    @property
    def agreement(self) -> tuple[int, int]:
        """(pairs of finalists that judge and score order alike, pairs that both of them order)."""
        judged = {row.competitor: row.strength for row in self.tournament.competitors} if self.tournament else {}
        both = [(f.score, judged[f.trial_id]) for f in self.finalists if f.trial_id in judged]
        return agreeing_pairs([score for score, _ in both], [strength for _, strength in both])

    def finalist(self, trial_id: str) -> JudgedFinalist:
        return next(f for f in self.finalists if f.trial_id == trial_id)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "settings": dict(self.settings), "agreement": list(self.agreement)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Judgement":
        tournament = data["tournament"]
        return cls(
            data["judge"], tuple(JudgedFinalist(**row) for row in data["finalists"]),
            Tournament.from_dict(tournament) if tournament else None, data["problem"], data["settings"],
        )


def finalists_to_judge(
    sweep: SweepRecord, *, top: int, also_searched: bool = False
) -> tuple[JudgedFinalist, ...]:
    """The confirmed configurations (with `also_searched` the first `top` of the search too), else the `top` ones in the
    answer's order and the baseline; those without a valid score have nothing to show."""
    return tuple(_finalist(configuration) for configuration in in_question(sweep, top=top, also_searched=also_searched))


def store(sweep: Path, judgement: Judgement) -> Path:
    """Write `judge/<judge>.json`; an earlier word of the same judge is replaced."""
    path = sweep / FOLDER / f"{_file_name(judgement.judge)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    text = json.dumps(judgement.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def stored_judgements(sweep: Path) -> tuple[Judgement, ...]:
    """Every judge's latest word, by file name. Raises SweepError for a file that is none."""
    found = []
    for path in sorted((sweep / FOLDER).glob("*.json")):
        try:
            found.append(Judgement.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SweepError(Problem(
                str(path), "", type(error).__name__, f"cannot be read ({error})", "remove it, and `prefopt judge` again"
            )) from error
    return tuple(found)


def judgement_lines(judgement: Judgement, *, best: str | None) -> list[str]:
    """In plain words, the best configuration first; `best` is the trial that the sweep's answer names."""
    tournament = judgement.tournament
    if tournament is None:
        return [f"The judge {judgement.judge} gave no verdict: {judgement.problem}; `prefopt judge` asks again."]
    named = next((row for row in tournament.competitors if row.competitor == best), None)
    strongest = tournament.competitors[0]
    usual = next((f.trial_id for f in judgement.finalists if f.baseline), None)  # a confirmed one stands first
    baseline = next((row for row in tournament.competitors if row.competitor == usual), None)
    shown = [("the best", named)] if named else []
    if strongest is not named:
        shown.append((f"the strongest, {_described(judgement, strongest)},", strongest))
    if baseline is not None and baseline not in (named, strongest):
        shown.append(("the baseline", baseline))
    said = "; ".join(f"{who} wins {_rate(row)}" for who, row in shown)
    alike, ordered = judgement.agreement
    order = f" It orders {alike} of {ordered} pairs of finalists as the sweep does." if ordered else ""
    return [f"By the judge {judgement.judge} ({strongest.judged} prompts), against the reference: {said}.{order}",
            *_trouble_lines(tournament), *_cost_lines(tournament.tally)]


def _described(judgement: Judgement, row: JudgedCompetitor) -> str:
    return f"{row.competitor} ({judgement.finalist(row.competitor).label})"


def _rate(row: JudgedCompetitor) -> str:
    return f"{100 * row.win_rate:.0f} % ({100 * row.win_low:.0f} to {100 * row.win_high:.0f})"


def _trouble_lines(tournament: Tournament) -> list[str]:
    """What keeps the verdicts from being whole."""
    tally, lines = tournament.tally, []
    contests = tournament.prompts * len(tournament.contests)
    if tally.not_asked:
        judged = max(row.judged for row in tournament.competitors)
        lines.append(f"Note: the judge's cost cap was reached after {judged} of {tournament.prompts} prompts.")
    lost = tally.unparsable + tally.unanswered
    if lost:
        shown = f", such as {tally.example!r}" if tally.example else ""
        lines.append(f"Note: {lost} answers of the judge had no verdict{shown}.")
    if 4 * tournament.flipped > contests:
        lines.append(f"Note: {tournament.flipped} of {contests} verdicts changed with the order of the answers; they "
                     "count as ties, and this judge may not be able to tell these answers apart.")
    return lines


def _cost_lines(tally: Tally) -> list[str]:
    """What an endpoint took; a judge that is not paid by the call counts none."""
    if not tally.asked + tally.cached:
        return []
    price = "" if tally.usd is None else f", for ${tally.usd:.2f}"
    return [f"Note: the judge was called {tally.asked} times{price}; {tally.cached} answers came from the cache."]


def _finalist(configuration: Configuration) -> JudgedFinalist:
    first = configuration.first
    return JudgedFinalist(
        first.trial_id, configuration.best_step, configuration.score, first.baseline, first.config.label
    )


def _file_name(judge: str) -> str:
    """The end of a long path or hub id, in letters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", judge).strip("-.")[-80:] or "judge"
