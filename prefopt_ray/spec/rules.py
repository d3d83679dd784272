"""Rules between keys: what pydantic's types cannot say. Each rule yields findings; none stops the others.

A rule names the sections it reads and runs whenever those are valid in themselves, so that one mistake does
not hide another.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt_ray.losses.cards import CARDS, LossCard, closest_loss, find_card
from prefopt_ray.losses.cards_used import NLL
from prefopt_ray.losses.compositions import ALIASES
from prefopt_ray.spec.layers import UNREAD
from prefopt_ray.spec.sections import (
    BANDIT,
    DIVERGENCE_KEYS,
    DIVERGENCE_RULE,
    EMBEDDED,
    GOLD,
    PRESETS,
    RUNGS,
    SCORE_COLUMNS,
    ConfirmSpec,
    DataSpec,
    JudgeSpec,
    ModelSpec,
    ObjectiveSpec,
    PartSpec,
    ReplicatesSpec,
    ResourcesSpec,
    SamplesSpec,
    SchedulerSpec,
    SearchSpec,
    Section,
    TrainingSpec,
    divergence_fix,
)
from prefopt_ray.spec.space import (
    LEARNING_RATE,
    Choices,
    Domain,
    Integer,
    LogUniform,
    distinct_points,
    extremes,
    loss_space,
    spread,
)
from prefopt_ray.spec.steps import rung_steps

MAX_TRIALS = 100_000  # far above any real sweep: a slip must not fill the memory with configurations


@dataclass(frozen=True)
class Finding:
    """A broken rule at a key; the place and the value found are added by whoever holds the text."""

    path: tuple[str, ...]
    rule: str
    fix: str = ""


def unknown_loss(written: str) -> tuple[str, str]:
    """(rule, fix) for a name that `find_card` does not know; why, where it is a composition that is not defined."""
    try:
        find_card(written)
    except KeyError as error:
        _, is_explained, why = str(error.args[0]).partition(": ")
        if is_explained:
            return why, ""
    if written == NLL.name:
        return "nll is a part of mixtures only, such as sigmoid+nll", ""
    if any(part in ALIASES for part in written.split("+")):
        return _mixed_alias(written)
    used = ", ".join(name for name, card in CARDS.items() if not card.experimental)
    return f"unknown loss; widely used are {used}; `prefopt losses` lists all", _meant_loss(written)


def findings(sections: Mapping[str, Any]) -> Iterator[Finding]:
    """Every broken rule among the sections that are present."""
    for names, rule in _RULES:
        if all(name in sections for name in names):
            yield from rule(*(sections[name] for name in names))
    yield from _settings_are_read(sections)


# ---- model and data ----


def _embedded_task_is_whole(model: ModelSpec, data: DataSpec) -> Iterator[Finding]:
    own = model.policy if model.policy in EMBEDDED else None
    for name, part in _written_parts(data):
        if part.source not in (None, model.policy) and (own or part.source in EMBEDDED):
            rule = f"the {own} policy knows no words but its own" if own else f"{part.source} has a policy of its own"
            fix = f"policy and every source are {own or part.source}, or none is"
            yield Finding(("data", name, "source"), rule, fix)
    if own and data.text not in (None, "plain"):
        yield Finding(("data", "text"), f"the {own} task has no chat template", "write plain, or leave it out")
    if own == BANDIT and model.adapter.kind != "none":
        rule = "the bandit's policy is three numbers: no adapter fits on it"
        yield Finding(("model", "adapter", "kind"), rule, "write adapter: {kind: none}")


def _sources_read_their_keys(data: DataSpec) -> Iterator[Finding]:
    for name, part in _written_parts(data):
        source = data.part(name)
        if part.flipped is not None and (source.source != GOLD or name != "train"):
            yield Finding(("data", name, "flipped"), "only labels of gold train pairs can be flipped", "remove it")
        if source.source in EMBEDDED:
            unread, what = ("split", "data_dir", "files", "revision", "columns"), f"the {source.source} source"
            if source.source == BANDIT and name == "train":
                unread = unread[1:]
                if part.split is None:
                    rule = "which comparisons does the bandit observe?"
                    yield Finding(("data", name), rule, "add split: total_order")
            elif part.pairs is None:
                yield Finding(("data", name), f"{source.source} pairs are made on demand: how many?", "add pairs: 1000")
        elif source.is_local_file:
            unread, what = ("split", "data_dir", "files", "revision"), "a single local file as the source"
        else:
            continue
        for key in unread:
            if getattr(part, key) is not None:
                yield Finding(("data", name, key), f"is not read with {what}", "remove it, or name another source")


def _revision_is_of_the_hub(model: ModelSpec) -> Iterator[Finding]:
    if model.revision is not None and (model.policy in EMBEDDED or model.policy.startswith("/")):
        yield Finding(("model", "revision"), "only a hub id has revisions", "remove it")


def _scores_come_in_twos(data: DataSpec) -> Iterator[Finding]:
    written = [(("data", "columns"), data.columns)]
    written += [(("data", name, "columns"), part.columns or {}) for name, part in _written_parts(data)]
    for path, columns in written:
        given = [key for key in SCORE_COLUMNS if key in columns]
        if len(given) == 1:
            (missing,) = set(SCORE_COLUMNS) - set(given)
            yield Finding((*path, *given), f"both answers need a score: {missing} is missing", f"add {missing}: NAME")


def _parts_name_their_pairs(data: DataSpec) -> Iterator[Finding]:
    if data.train.from_ is not None:
        yield Finding(("data", "train", "from"), "train is what the others are carved from", "name a source")
    elif data.train.source is None:
        yield Finding(("data", "train"), "train needs a source", "add source: a hub id or a local file")
    for name, part in _written_parts(data):
        if name != "train":
            yield from _held_out_part(data, name, part)


def _held_out_part(data: DataSpec, name: str, part: PartSpec) -> Iterator[Finding]:
    path = ("data", name)
    if part.from_ is not None:
        for key in ("source", "revision", "split", "data_dir", "files", "columns"):
            if getattr(part, key) is not None:
                yield Finding((*path, key), "is not read beside `from: train`", "keep one of the two")
        if part.pairs is None:
            yield Finding(path, "how many pairs to carve out of train?", "add pairs: 1000")
    elif not data.is_embedded and data.train.source is not None and data.part(name).origin() == data.train.origin():
        fix = f"write {{from: train, pairs: {part.pairs or 1000}}}, or name another split"
        yield Finding(path, "these are the pairs that train reads", fix)


def _written_parts(data: DataSpec) -> Iterator[tuple[str, PartSpec]]:
    for name in ("train", "select", "test"):
        part = getattr(data, name)
        if part is not None:
            yield name, part


# ---- training and stopping ----


def _one_length(training: TrainingSpec) -> Iterator[Finding]:
    given = [key for key in ("epochs", "pairs", "steps") if getattr(training, key) is not None]
    if not given:
        rule = "how long to train? exactly one of epochs, pairs, steps is needed"
        yield Finding(("training",), rule, "add epochs: 1")
    for key in given[1:]:
        yield Finding(("training", key), f"the length is already given by {given[0]}", f"keep {key} or {given[0]}")
    if training.steps is not None and training.stop_step is not None and training.stop_step > training.steps:
        rule = f"stop_step is at most the full length, {training.steps} steps"
        yield Finding(("training", "stop_step"), rule, "lower it, or remove it to train to the end")


def _warmup_ends(training: TrainingSpec) -> Iterator[Finding]:
    steps, warmup = training.steps, training.warmup
    too_long = warmup == "100%" or (steps is not None and isinstance(warmup, int) and warmup >= steps)
    if too_long:
        yield Finding(("training", "warmup"), "warm-up must end before the training does", "3% is usual")


def _betas_of_adam(training: TrainingSpec) -> Iterator[Finding]:
    if not all(0 <= beta < 1 for beta in training.optimizer.betas):
        yield Finding(("training", "optimizer", "betas"), "both must be >= 0 and < 1", "[0.9, 0.999] is usual")


def _scheduler_is_complete(scheduler: SchedulerSpec) -> Iterator[Finding]:
    if scheduler.preset is not None:
        for key in ("first_rung", "keep_one_in"):
            if getattr(scheduler, key) is not None:
                preset = PRESETS[scheduler.preset]
                fix = f"remove one; {scheduler.preset} = keep 1 in {preset.keep_one_in}, first rung {preset.first_rung}"
                yield Finding(("scheduler", key), f"is already set by preset: {scheduler.preset}", fix)
    if scheduler.kind == "fixed" and scheduler.stop_steps is None:
        fix = "add stop_steps: {1: 80, 2: 320} (trial number: step; trial 0 is the baseline)"
        yield Finding(("scheduler",), "kind fixed stops trials at given steps", fix)


def _rungs_fit(scheduler: SchedulerSpec, training: TrainingSpec) -> Iterator[Finding]:
    if training.steps is None:
        return
    last = min(training.steps, training.stop_step or training.steps)
    if isinstance(scheduler.first_rung, int) and scheduler.first_rung > last:
        yield Finding(("scheduler", "first_rung"), f"training ends at step {last}", "10% is usual")
    no_rung = last > 1 and not rung_steps(scheduler, training.steps, last)
    if scheduler.has_rungs and scheduler.first_rung is None and no_rung:
        yield Finding(("training", "steps"), f"{last} steps leave no room for a rung", "scheduler: {kind: none}")
    for trial, step in (scheduler.stop_steps or {}).items():
        if step > last:
            rule = f"trial {trial} cannot stop at step {step}: training ends at step {last}"
            yield Finding(("scheduler", "stop_steps"), rule, "lower it")


def _settings_are_read(sections: Mapping[str, Section]) -> Iterator[Finding]:
    """A key that the chosen kind does not read is refused, not ignored."""
    for (path, key), unread in UNREAD.items():
        section = sections.get(path[0])
        for name in path[1:]:
            section = getattr(section, name, None)
        if section is None:
            continue
        chosen = getattr(section, key)
        for name in sorted(unread.get(chosen, frozenset()) & section.model_fields_set):
            yield Finding((*path, name), f"is not read with {key}: {chosen}", "remove it")


# ---- search ----


def _losses_are_known(search: SearchSpec) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for written in search.losses:
        card = _card(written)
        path = ("search", "losses", written)
        if card is None:
            yield Finding(path, *unknown_loss(written))
        elif card.name in seen:
            rule = f"{written} and {seen[card.name]} are the same loss"
            yield Finding(path, rule, f"keep one, as {card.name}")
        else:
            seen[card.name] = written
    if search.baseline is not None and _card(search.baseline.loss) is None:
        yield Finding(("search", "baseline", "loss"), *unknown_loss(search.baseline.loss))


def _losses_read_their_parameters(search: SearchSpec) -> Iterator[Finding]:
    for written, own in search.losses.items():
        card = _card(written)
        for name, domain in own.items() if card else ():
            yield from _parameter(card, name, domain, ("search", "losses", written, name))
    if search.baseline is not None and (card := _card(search.baseline.loss)):
        for name, value in search.baseline.values.items():
            yield from _parameter(card, name, Choices((value,)), ("search", "baseline", name))


def _losses_have_their_scores(search: SearchSpec, data: DataSpec) -> Iterator[Finding]:
    """A loss that learns from scores needs to know where they are; gold rows bring their own."""
    if data.is_gold or set(SCORE_COLUMNS) <= set(data.part("train").columns or {}):
        return
    written = [(("search", "losses", loss), loss) for loss in search.losses]
    if search.baseline is not None:
        written.append((("search", "baseline", "loss"), search.baseline.loss))
    for path, loss in written:
        card = _card(loss)
        if card is not None and "scores" in card.needs:
            rule = f"{card.name} learns from the scores of both answers, and no column is named for them"
            yield Finding(path, rule, "add data.columns: {chosen_score: score_chosen, rejected_score: score_rejected}")


def _shared_is_read(search: SearchSpec) -> Iterator[Finding]:
    cards = [card for written in search.losses if (card := _card(written))]
    if len(cards) < len(search.losses):
        return  # an unknown loss might have read it
    for name, domain in search.shared.items():
        path = ("search", "shared", name)
        readers = [card for card in cards if name in _readable(card)]
        if not readers:
            known = sorted({key for card in cards for key in _readable(card)})
            rule = f"no loss of this sweep reads {name}; they read {', '.join(known)}"
            yield Finding(path, rule, _meant(name, known))
        else:
            broken = (finding for card in readers for finding in _parameter(card, name, domain, path))
            yield from list(broken)[:1]  # one finding: the losses' hard rules are mostly the same


def _parameter(card: LossCard, name: str, domain: Domain, path: tuple[str, ...]) -> Iterator[Finding]:
    if name in DIVERGENCE_KEYS and name not in _readable(card):
        yield Finding(path, DIVERGENCE_RULE, divergence_fix(card.name, ""))
    elif name not in _readable(card):
        rule = f"{card.name} does not read {name}; it reads {', '.join(_readable(card))}"
        yield Finding(path, rule, _meant(name, _readable(card)))
    elif name == LEARNING_RATE:
        if min(extremes(domain)) <= 0:
            yield Finding(path, "learning_rate must be > 0", "5e-6 is usual for a LoRA, 5e-7 for every weight")
    else:
        param = card.param(name)
        if not all(param.allows(value) for value in extremes(domain)):
            yield Finding(path, param.rule, f"{param.usual.low:g} to {param.usual.high:g} is usual for {card.name}")


def _grid_is_finite(search: SearchSpec) -> Iterator[Finding]:
    if search.method != "grid":
        return
    for path, domain in _domains(search):
        if not isinstance(domain, Choices):
            log = isinstance(domain, LogUniform)
            values = spread(domain.low, domain.high, log=log)
            if isinstance(domain, Integer):
                values = tuple(sorted({round(value) for value in values}))
            listed = ", ".join(f"{value:g}" for value in values)
            yield Finding(path, "a grid needs the values, not a range", f"write [{listed}], or method: random")


def _trials_are_counted(search: SearchSpec, model: ModelSpec) -> Iterator[Finding]:
    if search.method == "grid":
        return
    if search.trials_per_loss is None:
        yield Finding(("search",), f"method {search.method} needs a number of trials", "add trials_per_loss: 8")
        return
    for written, own in search.losses.items():
        card = _card(written)
        if card is None or not set(own) <= set(_readable(card)):
            continue
        space = loss_space(card, own, search.shared, adapter_kind=model.adapter.kind, grid=False)
        if distinct_points(space) < search.trials_per_loss:
            rule = f"{written} has only {distinct_points(space):g} configurations for {search.trials_per_loss} trials"
            fix = "use method: grid, lower trials_per_loss, or give a range"
            yield Finding(("search", "losses", written), rule, fix)


def _trials_can_be_listed(search: SearchSpec, model: ModelSpec, scheduler: SchedulerSpec) -> Iterator[Finding]:
    """All trials are drawn beforehand; and a stop step is for a trial that exists."""
    if any(_card(written) is None for written in search.losses):
        return
    if search.method == "grid":
        spaces = [
            loss_space(_card(written), own, search.shared, adapter_kind=model.adapter.kind, grid=True)
            for written, own in search.losses.items()
        ]
        trials, path, fix = 1 + sum(map(distinct_points, spaces)), ("search", "losses"), "name fewer values"
        if math.isinf(trials):
            return  # a range in a grid is refused where it stands
    else:
        each = search.trials_per_loss or 0
        trials, path, fix = 1 + each * len(search.losses), ("search", "trials_per_loss"), "lower it"
    if trials > MAX_TRIALS:
        yield Finding(path, f"a sweep has at most {MAX_TRIALS:,} trials, this one has {trials:,.0f}", fix)
    for trial in scheduler.stop_steps or {}:
        if trial >= trials:
            rule = f"there is no trial {trial}: numbers go from 0 to {trials - 1:.0f}"
            yield Finding(("scheduler", "stop_steps"), rule, "remove it")


def _domains(search: SearchSpec) -> Iterator[tuple[tuple[str, ...], Domain]]:
    for written, own in search.losses.items():
        for name, domain in own.items():
            yield ("search", "losses", written, name), domain
    for name, domain in search.shared.items():
        yield ("search", "shared", name), domain


def _card(written: str) -> LossCard | None:
    try:
        return find_card(written)
    except KeyError:
        return None


def _readable(card: LossCard) -> tuple[str, ...]:
    return (*card.param_names, LEARNING_RATE)


def _mixed_alias(written: str) -> tuple[str, str]:
    """(rule, fix) where `rpo` or `mpo`, which are mixtures, stand as a part of one."""
    parts = written.split("+")
    aliases = " and ".join(f"{part} is {ALIASES[part]}" for part in dict.fromkeys(parts) if part in ALIASES)
    spelled = "+".join(dict.fromkeys("+".join(ALIASES.get(part, part) for part in parts).split("+")))  # each loss once
    return f"an alias cannot be mixed: {aliases}", f"write {spelled}" if _card(spelled) else "write their parts"


def _meant_loss(written: str) -> str:
    close = closest_loss(written.lower())
    meant = _card(close) if close else None
    if meant is None:
        return "one of your own is registered first: docs/guides/your-own-loss.md"
    return f"did you mean {close}?" if close == meant.name else f"did you mean {close} (= {meant.name})?"


def _meant(name: str, known: tuple[str, ...] | list[str]) -> str:
    nicknames = {"lr": LEARNING_RATE, "tau": "beta", "gamma": "gamma_ratio", "eps": "label_smoothing"}
    if nicknames.get(name) in known:
        return f"did you mean {nicknames[name]}?"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


# ---- judge and objective ----


def _one_judge(judge: JudgeSpec | None) -> Iterator[Finding]:
    if judge is None:
        return
    given = [kind for kind in ("reward_model", "callable", "endpoint") if getattr(judge, kind) is not None]
    if not given:
        yield Finding(("judge",), "who judges? one of reward_model, callable, endpoint", "add reward_model: org/model")
    for kind in given[1:]:
        yield Finding(("judge", kind), f"the judge is already {given[0]}", f"keep {kind} or {given[0]}")
    endpoint = judge.endpoint
    if endpoint is not None and endpoint.max_usd is not None and endpoint.usd_per_million_tokens is None:
        fix = "add usd_per_million_tokens: {input: 0.15, output: 0.6}, or use max_calls"
        yield Finding(("judge", "endpoint", "max_usd"), "dollars cannot be counted without prices", fix)


def _objective_is_measured(
    objective: ObjectiveSpec, samples: SamplesSpec, scheduler: SchedulerSpec, data: DataSpec, judge: JudgeSpec | None
) -> Iterator[Finding]:
    """An objective on completions needs them wherever the scheduler decides, and somebody to judge them there."""
    path = ("objective", "metric")
    if objective.metric == "gain":
        return
    if objective.metric == "gold" and not data.is_gold:
        yield Finding(path, "only the embedded task has a gold reward", "use gain, or judge with a judge section")
    if objective.metric == "judge" and (judge is None or judge.at != "rungs"):
        yield Finding(path, "needs a judge at every rung", "add judge: {reward_model: org/model, at: rungs}")
    if not samples.at or (scheduler.has_rungs and RUNGS not in samples.at):
        rule = f"objective {objective.metric} is measured on sampled completions, and the scheduler decides by it at every rung"
        yield Finding(("samples", "at"), rule, "write at: rungs")


# ---- seeds ----


def _replicates_are_replicates(replicates: ReplicatesSpec | None, training: TrainingSpec) -> Iterator[Finding]:
    if replicates is None:
        return
    yield from _distinct("replicates", replicates.seeds)
    if len(replicates.seeds) == 1:
        rule = "one seed is no replicate"
        yield Finding(("replicates", "seeds"), rule, f"name two or more, or write training: {{seed: {replicates.seeds[0]}}}")
    if "seed" in training.model_fields_set:
        yield Finding(("training", "seed"), "is not read beside replicates.seeds", "remove it")
    last = training.stop_step or training.steps
    if isinstance(replicates.from_, int) and last is not None and replicates.from_ > last:
        yield Finding(("replicates", "from"), f"training ends at step {last}", "30% is usual")


def _confirmation_is_fresh(
    confirm: ConfirmSpec | None, replicates: ReplicatesSpec | None, training: TrainingSpec
) -> Iterator[Finding]:
    """A seed that took part in the selection confirms nothing."""
    if confirm is None:
        return
    yield from _distinct("confirm", confirm.seeds)
    used = replicates.seeds if replicates is not None else (training.seed,)
    if shared := sorted(set(confirm.seeds) & set(used)):
        where = "replicates.seeds" if replicates is not None else "training.seed"
        rule = f"{', '.join(map(str, shared))} selected the finalists already ({where})"
        yield Finding(("confirm", "seeds"), rule, "name fresh seeds")


def _distinct(section: str, seeds: tuple[int, ...]) -> Iterator[Finding]:
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        rule = f"{', '.join(map(str, twice))} is there twice: the same seed trains the same adapter again"
        yield Finding((section, "seeds"), rule, "name each seed once")


# ---- resources ----


def _gpus_can_be_shared(resources: ResourcesSpec) -> Iterator[Finding]:
    if resources.trials_per_gpu > 1 and resources.gpus_per_trial not in ("auto", 1.0):
        rule = f"several trials share a GPU only if each asks for one, not {resources.gpus_per_trial:g}"
        yield Finding(("resources", "trials_per_gpu"), rule, "remove one of gpus_per_trial and trials_per_gpu")
    share = resources.gpus_per_trial
    if isinstance(share, float) and share > 1 and not share.is_integer():
        yield Finding(("resources", "gpus_per_trial"), "above 1 it is a whole number of GPUs", "write 2 or 0.5")
    if isinstance(share, float) and share > 1:
        rule = "one trial over several GPUs is known, but not supported yet"
        yield Finding(("resources", "gpus_per_trial"), rule, "write 1: several trials run side by side")


Rule = Callable[..., Iterator[Finding]]

_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("model", "data"), _embedded_task_is_whole),
    (("data",), _sources_read_their_keys),
    (("model",), _revision_is_of_the_hub),
    (("data",), _parts_name_their_pairs),
    (("data",), _scores_come_in_twos),
    (("training",), _one_length),
    (("training",), _warmup_ends),
    (("training",), _betas_of_adam),
    (("scheduler",), _scheduler_is_complete),
    (("scheduler", "training"), _rungs_fit),
    (("search",), _losses_are_known),
    (("search",), _losses_read_their_parameters),
    (("search", "data"), _losses_have_their_scores),
    (("search",), _shared_is_read),
    (("search",), _grid_is_finite),
    (("search", "model"), _trials_are_counted),
    (("search", "model", "scheduler"), _trials_can_be_listed),
    (("replicates", "training"), _replicates_are_replicates),
    (("confirm", "replicates", "training"), _confirmation_is_fresh),
    (("resources",), _gpus_can_be_shared),
    (("judge",), _one_judge),
    (("objective", "samples", "scheduler", "data", "judge"), _objective_is_measured),
)
