"""Rules between keys: what pydantic's types cannot say. Each rule yields findings; none stops the others.

A rule names the sections it reads and runs whenever those are valid in themselves, so that one mistake does
not hide another.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt_ray.losses.cards import CARDS, LOSS_NAMES, LossCard, closest_loss, find_card
from prefopt_ray.spec.layers import UNREAD
from prefopt_ray.spec.sections import (
    GOLD,
    PRESETS,
    SCORE_COLUMNS,
    DataSpec,
    ModelSpec,
    PartSpec,
    ResourcesSpec,
    SchedulerSpec,
    SearchSpec,
    Section,
    TrainingSpec,
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


def findings(sections: Mapping[str, Any]) -> Iterator[Finding]:
    """Every broken rule among the sections that are present."""
    for names, rule in _RULES:
        if all(name in sections for name in names):
            yield from rule(*(sections[name] for name in names))
    yield from _settings_are_read(sections)


# ---- model and data ----


def _gold_is_whole(model: ModelSpec, data: DataSpec) -> Iterator[Finding]:
    gold_policy = model.policy == GOLD
    fix = "policy and every source are gold, or none is"
    for name, part in _written_parts(data):
        if part.source is not None and (part.source == GOLD) != gold_policy:
            rule = "the gold policy knows no words but its own" if gold_policy else "gold pairs are for the gold policy"
            yield Finding(("data", name, "source"), rule, fix)
    if gold_policy and data.text not in (None, "plain"):
        yield Finding(("data", "text"), "the gold language has no chat template", "write plain, or leave it out")


def _sources_read_their_keys(data: DataSpec) -> Iterator[Finding]:
    for name, part in _written_parts(data):
        source = data.part(name)
        if source.source == GOLD:
            unread, what = ("split", "data_dir", "files", "revision", "columns"), "the gold source"
            if part.pairs is None:
                yield Finding(("data", name), "gold pairs are made on demand: how many?", "add pairs: 1000")
        elif source.is_local_file:
            unread, what = ("split", "data_dir", "files", "revision"), "a single local file as the source"
        else:
            continue
        for key in unread:
            if getattr(part, key) is not None:
                yield Finding(("data", name, key), f"is not read with {what}", "remove it, or name another source")


def _revision_is_of_the_hub(model: ModelSpec) -> Iterator[Finding]:
    if model.revision is not None and (model.policy == GOLD or model.policy.startswith("/")):
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
    elif not data.is_gold and data.train.source is not None and data.part(name).origin() == data.train.origin():
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
    if scheduler.kind == "asha" and scheduler.first_rung is None and no_rung:
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
            yield Finding(path, _unknown_loss(), _meant_loss(written))
        elif card.name in seen:
            rule = f"{written} and {seen[card.name]} are the same loss"
            yield Finding(path, rule, f"keep one, as {card.name}")
        else:
            seen[card.name] = written
    if search.baseline is not None and _card(search.baseline.loss) is None:
        yield Finding(("search", "baseline", "loss"), _unknown_loss(), _meant_loss(search.baseline.loss))


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
    if name not in _readable(card):
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


def _meant_loss(written: str) -> str:
    close = closest_loss(written.lower())
    full = f"did you mean {close}?" if close else ""
    return full if close is None or close in CARDS else f"did you mean {close} (= {find_card(close).name})?"


def _meant(name: str, known: tuple[str, ...] | list[str]) -> str:
    nicknames = {"lr": LEARNING_RATE, "tau": "beta", "gamma": "gamma_ratio", "eps": "label_smoothing"}
    if nicknames.get(name) in known:
        return f"did you mean {nicknames[name]}?"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


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
    (("model", "data"), _gold_is_whole),
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
    (("resources",), _gpus_can_be_shared),
)
