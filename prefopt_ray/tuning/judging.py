"""Judging finalists after the trials: their completions are drawn where trials run, as a Ray task, and kept.

A reward model is asked in a task too, with a trial's share of the machine; functions and endpoints are asked from
the driver's own process, which is the one that has a person's module folder and keys.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from prefopt_ray.engine.base import REFERENCE
from prefopt_ray.engine.loading import load_tokenizer
from prefopt_ray.engine.reference import Progress
from prefopt_ray.errors import PrefoptError, Problem, SweepError
from prefopt_ray.results.judgement import JudgedFinalist, Judgement, finalists_to_judge, store
from prefopt_ray.judges.base import Prompt
from prefopt_ray.judges.completions import Sampled, Sampling, shared_prompts, stored_completions, write_completions
from prefopt_ray.judges.opening import judge_name, open_judge
from prefopt_ray.judges.prompts import read_prompts
from prefopt_ray.judges.tournament import REFERENCE_NAME, Tournament, play
from prefopt_ray.results.ledger import SweepRecord
from prefopt_ray.pairs.tokens import Ragged
from prefopt_ray.prepare import Prepared, WorkerBlueprint, pairs_config
from prefopt_ray.spec import SweepSpec, load_spec
from prefopt_ray.spec.sections import JudgeSpec
from prefopt_ray.train.export import load_best
from prefopt_ray.train.scorers import Completion
from prefopt_ray.trial import TrialConfig
from prefopt_ray.tuning.passes import Reserved, task_value

SEEDS_APART = 1_000_003

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ground:
    """Where completions are drawn: an open blueprint, the data it was made from, and a trial's reservation."""

    blueprint: ray.ObjectRef
    prepared: Prepared
    reserved: Reserved


@dataclass(frozen=True)
class Question:
    """Whom to ask about how much; `judge` None is the gold reward."""

    judge: JudgeSpec | None
    top: int
    prompts: int
    also_searched: bool = False  # after a confirmation, the first `top` of the search beside the confirmed ones


def questions(spec: SweepSpec) -> tuple[Question, ...]:
    """What a sweep is judged by at its end: the gold reward where there is one, and the spec's judge."""
    usual = JudgeSpec()
    asked = []
    if spec.data.is_gold:
        size = spec.judge or usual
        asked.append(Question(None, size.top, size.prompts))
    if spec.judge is not None:
        asked.append(Question(spec.judge, spec.judge.top, spec.judge.prompts))
    return tuple(asked)


def chosen_questions(
    folder: Path, overrides: Sequence[str], *, top: int | None, prompts: int | None
) -> tuple[Question, ...]:
    """The spec's questions, or that of the judge which `overrides` (`reward_model=org/model`) name instead. A `top`
    asks for that many of the search also where there was a confirmation.

    Raises SpecError for a judge that is none, SweepError when nobody is named.
    """
    lines = [f"judge.{line}" for line in overrides]
    spec = load_spec(folder / "spec.yaml", overrides=lines)
    asked = questions(spec)
    if overrides:
        asked = tuple(question for question in asked if question.judge is not None)
    if not asked:
        fix = "add --with reward_model=org/model, --with callable=judges.py:score, or a judge section to the next spec"
        raise SweepError(Problem(str(folder / "spec.yaml"), "judge", "", "this sweep names no judge", fix))
    return tuple(
        replace(q, top=top or q.top, prompts=prompts or q.prompts, also_searched=top is not None) for q in asked
    )


def judge_sweep(
    sweep: SweepRecord, spec: SweepSpec, question: Question, *, ground: Callable[[], Ground],
    stage: Callable[[str], Progress],
) -> Judgement:
    """Draw what is missing, ask, store. `ground` is asked only if something must be drawn or a model be loaded.

    Raises SweepError when no configuration has a valid score, and what the judge raises; the completions are kept then.
    """
    finalists = finalists_to_judge(sweep, top=question.top, also_searched=question.also_searched)
    if not finalists:
        raise SweepError(Problem(str(sweep.folder), "", "", "no configuration has a valid score; none can be judged"))
    samples = _completions(sweep, spec, finalists, wanted=question.prompts, ground=ground, stage=stage)
    prompts = shared_prompts(samples)
    said = {one.sampling.competitor: one.completions for one in samples}
    tournament = _ask(question.judge, spec, prompts, said, ground=ground, stage=stage)
    settings = question.judge.model_dump(exclude_none=True) if question.judge else {}
    judgement = Judgement(tournament.judge, finalists, tournament, settings=settings)
    store(sweep.folder, judgement)
    return judgement


def judge_at_end(
    sweep: SweepRecord, spec: SweepSpec, *, ground: Ground, stage: Callable[[str], Progress]
) -> list[Judgement]:
    """Every question of the spec; none where no configuration has a valid score. A judge that fails takes no answer
    away: what it failed of is stored instead."""
    judgements = []
    for question in questions(spec):
        finalists = finalists_to_judge(sweep, top=question.top)
        if not finalists:
            return []
        try:
            judgements.append(judge_sweep(sweep, spec, question, ground=lambda: ground, stage=stage))
        except Exception as error:  # noqa: BLE001 - the trials are paid for: whatever a judge dies of is stored
            problem = _first_line(error)
            log.warning("the judge could not finish: %s", problem, exc_info=not isinstance(error, PrefoptError))
            failed = Judgement(judge_name(question.judge), finalists, problem=problem)
            store(sweep.folder, failed)
            judgements.append(failed)
    return judgements


def _first_line(error: Exception) -> str:
    """Of what went wrong; the text of an error from a Ray task opens with the task and its process."""
    cause = (error.cause or error) if isinstance(error, ray.exceptions.RayTaskError) else error
    first = next(iter(str(cause).splitlines()), "")
    return first if isinstance(cause, PrefoptError) else f"{type(cause).__name__}: {first}"


def _ask(
    judge: JudgeSpec | None, spec: SweepSpec, prompts: Sequence[Prompt], said: dict[str, Sequence[Completion]],
    *, ground: Callable[[], Ground], stage: Callable[[str], Progress],
) -> Tournament:
    if judge is not None and judge.reward_model is not None:
        reserved = ground().reserved
        task = _reward_model_task.options(num_cpus=reserved["cpu"], num_gpus=reserved["gpu"])
        return task_value(task.remote(judge, spec.storage, prompts, said))
    opened = open_judge(judge, storage=spec.storage, device="cpu")
    pairs = len(said) * (len(said) - 1) // 2
    total = len(prompts) * (len(said) if hasattr(opened, "score") else 2 * pairs)
    progress = stage("judge")
    return play(opened, prompts, said, advance=lambda done: progress(done, total))


# -- completions -----------------------------------------------------------------------------------


def _completions(
    sweep: SweepRecord, spec: SweepSpec, finalists: Sequence[JudgedFinalist], *, wanted: int,
    ground: Callable[[], Ground], stage: Callable[[str], Progress],
) -> list[Sampled]:
    """Of the reference and every finalist on the same test prompts, those that are missing drawn and stored."""
    samplings = _samplings(sweep, spec, finalists, wanted=wanted)
    found = {s.competitor: stored_completions(sweep.folder, s) for s in samplings}
    missing = [sampling for sampling in samplings if found[sampling.competitor] is None]
    if missing:
        opened = ground()
        test = opened.prepared.loaded.data.test
        rows = test.first_of_groups(wanted)
        prompts = read_prompts(
            pairs_config(spec, opened.prepared.blueprint.model), "test", test.row_ids[rows]
        )
        progress = stage("completions")
        drawn = _draw(sweep, missing, test.prompt.take(rows), ground=opened)
        for number, (sampling, completions) in enumerate(drawn, start=1):
            found[sampling.competitor] = Sampled(sampling, prompts, completions)
            write_completions(sweep.folder, found[sampling.competitor])
            progress(number, len(missing))
    return [found[sampling.competitor] for sampling in samplings]


def _samplings(
    sweep: SweepRecord, spec: SweepSpec, finalists: Sequence[JudgedFinalist], *, wanted: int
) -> list[Sampling]:
    """A seed for each: with one for all, policies that hardly differ would say the same, and a comparison with one
    of them would say nothing about how often it wins against another draw."""
    limit, seed = spec.samples.max_new_tokens, spec.samples.seed
    policies = [
        Sampling(f.trial_id, f.step, seed + SEEDS_APART * (2 + sweep.trials[f.trial_id].number), limit, wanted)
        for f in finalists
    ]
    return [Sampling(REFERENCE_NAME, 0, seed + SEEDS_APART, limit, wanted), *policies]


def _draw(
    sweep: SweepRecord, samplings: Sequence[Sampling], prompts: Ragged, *, ground: Ground
) -> Iterator[tuple[Sampling, tuple[Completion, ...]]]:
    configs = {s.competitor: sweep.trials[s.competitor].config for s in samplings if s.competitor in sweep.trials}
    task = _sampling_task.options(num_cpus=ground.reserved["cpu"], num_gpus=ground.reserved["gpu"])
    for reference in task.remote(ground.blueprint, sweep.folder, samplings, configs, prompts):
        yield task_value(reference)


@ray.remote(num_returns="streaming", max_retries=0)
def _sampling_task(
    blueprint: WorkerBlueprint, folder: Path, samplings: Sequence[Sampling], configs: dict[str, TrialConfig],
    prompts: Ragged,
) -> Iterator[tuple[Sampling, tuple[Completion, ...]]]:
    worker, tokenizer = blueprint(), load_tokenizer(blueprint.model)
    for sampling in samplings:
        slot = REFERENCE if sampling.competitor == REFERENCE_NAME else 0
        if slot != REFERENCE:
            home = folder / "trials" / sampling.competitor
            load_best(configs[sampling.competitor], worker, home, best_step=sampling.step)
        drawn = worker.engine.sample(slot, prompts, max_new_tokens=sampling.max_new_tokens, seed=sampling.seed)
        texts = [tokenizer.decode(drawn.completions[i].tolist(), skip_special_tokens=True) for i in range(len(prompts))]
        lengths = drawn.completions.lengths
        yield sampling, tuple(
            Completion(text, int(length), finished=bool(finished))
            for text, length, finished in zip(texts, lengths, drawn.finished, strict=True)
        )


@ray.remote(max_retries=0)
def _reward_model_task(judge: JudgeSpec, storage: Path, prompts: Sequence[Prompt], said: dict[str, Any]) -> Tournament:
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    return play(open_judge(judge, storage=storage, device=device), prompts, said)
