"""`prefopt plan`: what it counts follows from the spec, what it measures is a trial's, and it fits 80 columns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from journeys.journey import write_pairs
from tiny import save_chat_model

from prefopt_ray.engine.batches import shared_lengths
from prefopt_ray.engine.local import LocalEngine
from prefopt_ray.plan import memory
from prefopt_ray.plan.estimate import SweepPlan, estimate
from prefopt_ray.plan.lines import plan_json, plan_lines
from prefopt_ray.plan.memory import Gauge, Room, room
from prefopt_ray.plan.probe import LIBRARIES, Probe, probe
from prefopt_ray.prepare import Prepared, prepare
from prefopt_ray.spec import SweepSpec
from prefopt_ray.train.schedule import batch_indices
from prefopt_ray.tuning.planning import added_passes, dearest_config

GIB = 2**30


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    home = tmp_path_factory.mktemp("plan")
    save_chat_model(home / "model")
    write_pairs(home / "pairs.jsonl", count=200)
    spec = SweepSpec.from_dict({
        "name": "mine", "model": {"policy": str(home / "model"), "dtype": "float32"},
        "data": {"train": {"source": str(home / "pairs.jsonl")}, "max_tokens": 64},
        "training": {"steps": 30, "batch_pairs": 8},
        "search": {"trials_per_loss": 2, "losses": {"sigmoid": {}, "aot": {}}},
        "samples": {"prompts": 8, "max_new_tokens": 8}, "storage": str(home / "results"),
    })
    return prepare(spec, stage=lambda name: lambda done, total: None, device="cpu", threads=1)


@pytest.fixture(scope="module")
def measured(prepared: Prepared) -> Probe:
    return probe(prepared.blueprint, prepared.loaded.data, dearest_config(prepared))


def planned(prepared: Prepared, measured: Probe, **changes: object) -> SweepPlan:
    config, changed = dearest_config(prepared), replace(measured, **changes)
    return estimate(prepared, config, changed, slots=2, places=1, reference_stored=False)


def test_the_dearest_loss_is_probed(prepared: Prepared) -> None:
    assert dearest_config(prepared).loss == "aot"  # it goes over a step's pairs twice


def test_data_and_stored_references_cost_no_pass() -> None:
    dearest_first = ["tdpo", "aot", "wpo", "rebel"]  # tdpo reads whole distributions, wpo squares of probabilities
    assert sorted(dearest_first, key=added_passes, reverse=True) == dearest_first
    assert [added_passes(loss) for loss in ("sigmoid", "rebel", "ld_dpo", "simpo")] == [0, 0, 0, 0]


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_CGROUPS", ((limit, used), (tmp_path / "none", tmp_path / "none")))
    limit.write_text("max\n")
    used.write_text(f"{GIB}\n")
    unlimited = room("cpu")
    limit.write_text(f"{GIB + GIB // 2}\n")
    held = room("cpu")
    own = memory.peak_bytes("cpu")
    assert held.total == GIB + GIB // 2 < unlimited.total
    assert held.available == pytest.approx(GIB // 2 + own - 0.05 * held.total, abs=2)


def test_a_judge_inside_trials_is_said_to_be_untimed(prepared: Prepared, measured: Probe) -> None:
    plan = planned(prepared, measured)
    assert not plan.judged and "judge" not in " ".join(plan_lines(plan))
    assert "judge" in " ".join(plan_lines(replace(plan, judged=True)))


def test_the_widest_micro_batch_is_found_among_the_trials_own(prepared: Prepared, measured: Probe) -> None:
    data, config = prepared.loaded.data.train, dearest_config(prepared)
    sizes = []
    for step in range(len(data) // 8):
        rows = batch_indices(step, pairs=len(data), batch=8, seed=config.seed)
        sizes.append(sum(len(data.prompt[i]) + len(data.chosen[i]) + len(data.rejected[i]) - 2 for i in rows))
    assert max(sizes) < measured.plan.micro_batch_tokens  # so that a step is one forward
    assert measured.widest_tokens == max(sizes)


def test_the_time_of_a_trial_is_the_sum_of_what_it_does(prepared: Prepared, measured: Probe) -> None:
    plan = planned(prepared, measured, step_s=2.0, pair_s=0.01, draw_s=3.0, save_s=0.5)
    evaluation, select = plan.config.evaluation, len(prepared.loaded.data.select)
    assert plan.trial.training == 60 and plan.trial.samples == 3 * len(evaluation.sample_steps)
    assert plan.trial.select == pytest.approx(0.01 * select * (len(evaluation.steps) - 1))
    assert plan.trial.checkpoints == 0.5 * len(evaluation.steps)
    train, held = (shared_lengths(part) for part in (prepared.loaded.data.train, prepared.loaded.data.select))
    probed = min(evaluation.probe_pairs, len(train)) * len(evaluation.steps)
    assert plan.trial.probe == pytest.approx(0.01 * probed * train.mean() / held.mean())
    shares = (plan.trial.select + plan.trial.probe + plan.trial.samples) / plan.trial.total
    assert plan.trial.evaluating_share == pytest.approx(shares)
    rounds = -(-plan.trials // 2)
    tokens = sum(shared_lengths(part).sum() for part in prepared.loaded.data.parts.values())
    assert plan.reference_s == pytest.approx(0.01 * tokens / held.mean())
    assert plan.sweep_s == pytest.approx(plan.reference_s + measured.open_s + rounds * plan.trial.total)


def test_memory_limits_how_many_run_at_once(prepared: Prepared, measured: Probe) -> None:
    plan = planned(prepared, measured, memory={LIBRARIES: GIB, "training step": GIB}, room=Room(8 * GIB, 5 * GIB))
    assert plan.probe.peak == 2 * GIB and plan.fitting == 2 and plan.at_once == 2
    assert planned(prepared, measured, room=Room(2 * GIB, 0)).fitting == 0
    assert replace(plan, slots=9, places=2).at_once == 4


def test_every_stage_but_the_first_is_a_rise_of_one_peak(measured: Probe) -> None:
    assert all(rise >= 0 for rise in measured.memory.values())
    assert measured.memory[LIBRARIES] > 100 * 2**20 and measured.peak < measured.room.total


def test_a_gauge_sees_what_was_held_for_a_moment() -> None:
    gauge = Gauge("cpu")
    gauge.mark("before")
    held = np.ones(gauge.peak // 8 + 8_000_000)  # more than this process ever had
    del held
    gauge.mark("held")
    assert gauge.rises["held"] > 50 * 2**20 and room("cpu").available <= room("cpu").total


def test_the_words_fit_80_columns_and_name_what_a_person_asks(prepared: Prepared, measured: Probe) -> None:
    lines = plan_lines(planned(prepared, measured))
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80
    for words in ("up to 5 trials", "30 of 8 pairs", "flat (llama is served", "evaluating takes", "a trial (", "fit in"):
        assert words in text
    document = json.loads(json.dumps(plan_json(planned(prepared, measured)), allow_nan=False))
    assert document["memory_bytes"]["trial"] == measured.peak and document["steps"] == 30


def test_a_probe_computes_as_a_trial_does(prepared: Prepared, measured: Probe) -> None:
    assert measured.plan.engine == "flat" and measured.plan.threads == prepared.blueprint.threads == 1


def test_forward_tokens_count_padding_where_there_is_some(prepared: Prepared) -> None:
    from prefopt_ray.engine.choose import EngineChoice

    pairs, config = prepared.loaded.data.train.take(np.arange(8)), dearest_config(prepared)
    lengths = pairs.prompt.lengths + pairs.chosen.lengths + pairs.rejected.lengths - 2

    def tokens(choice: EngineChoice) -> list[int]:
        engine = replace(prepared.blueprint, choice=choice).open_engine()
        assert isinstance(engine, LocalEngine)
        return engine.forward_tokens(_Trial(config), pairs)

    assert tokens(prepared.blueprint.choice) == [lengths.sum()]
    assert tokens(EngineChoice("plain", "")) == [8 * lengths.max()]


class _Trial:
    slot = 0

    def __init__(self, config: object) -> None:
        self.config = config
