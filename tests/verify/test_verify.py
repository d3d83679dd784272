"""`prefopt verify`: engines and TRL make the same steps on a person's model and pairs, and what does not is said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from journeys.journey import write_pairs
from tiny import save_chat_model
from transformers import GPT2Config, GPT2LMHeadModel

from prefopt_ray.cli import main
from prefopt_ray.engine.choose import FLAT, PLAIN, ROWS
from prefopt_ray.spec import SweepSpec
from prefopt_ray.verify.arms import Arm, VerifiedStep
from prefopt_ray.verify.differences import FLOAT32, compare, measured_limits
from prefopt_ray.verify.lines import verification_json, verification_lines
from prefopt_ray.verify.steps import Verification, verify_steps
from prefopt_ray.verify.trl_arm import TRL, obstacle

STEPS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    save_chat_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=120)
    return folder


def spec_of(home: Path, *, loss: str = "sigmoid", adapter: str = "lora", **model: object) -> SweepSpec:
    return SweepSpec.from_dict({
        "name": "mine",
        "model": {"policy": str(home / "model"), "dtype": "float32", "adapter": {"kind": adapter}, **model},
        "data": {"train": {"source": str(home / "pairs.jsonl")}, "max_tokens": 64},
        "training": {"steps": 40, "batch_pairs": 12},
        "search": {"trials_per_loss": 1, "losses": {loss: {}}, "baseline": {"loss": loss, "learning_rate": 1e-3}},
        "storage": str(home / "results"),
    })


def verified(spec: SweepSpec) -> Verification:
    return verify_steps(spec, steps=STEPS, stage=lambda name: lambda done, total: None)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_flat_plain_and_trl_agree(home: Path, adapter: str) -> None:
    pytest.importorskip("trl")
    found = verified(spec_of(home, adapter=adapter))
    assert [arm.name for arm in found.arms] == [FLAT, PLAIN, TRL]  # 12 pairs: TRL accumulates two micro-batches
    assert all(len(arm.steps) == STEPS for arm in found.arms)
    assert found.agree, verification_lines(found, name="mine")
    first, last = (np.array([arm.steps[step].loss for arm in found.arms]) for step in (0, -1))
    assert first == pytest.approx(np.log(2), abs=1e-6) and abs(last - first).min() > 1e-5  # the weights moved


def test_a_loss_that_trl_has_not_is_compared_without_it(home: Path) -> None:
    found = verified(spec_of(home, loss="simpo"))
    assert [arm.name for arm in found.arms] == [FLAT, PLAIN]
    assert found.agree and "no loss that equals simpo" in found.left_out[TRL]


def test_a_model_that_is_not_served_flat_is_compared_with_rows(home: Path, tmp_path: Path) -> None:
    save_chat_model(tmp_path / "model")
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    found = verified(spec_of(home, loss="simpo", policy=str(tmp_path / "model")))
    assert [arm.name for arm in found.arms] == [PLAIN, ROWS]
    assert found.agree and "gpt2 is not among" in found.left_out[FLAT]


def test_half_precision_is_held_to_the_plain_engines_own_spread(home: Path) -> None:
    found = verified(spec_of(home, loss="simpo", dtype="bfloat16"))
    assert found.spread is not None and found.agree, verification_lines(found, name="mine")
    spread = {difference.quantity: difference.absolute for difference in found.spread.differences}
    assert spread["logps"] > FLOAT32["logps"].absolute
    assert found.limits["logps"].absolute == pytest.approx(3 * spread["logps"])


def test_the_words_fit_80_columns_and_the_json_holds_every_number(home: Path) -> None:
    found = verified(spec_of(home, loss="simpo"))
    lines = verification_lines(found, name="mine")
    assert max(map(len, lines)) <= 80 and lines[-1] == "flat, plain agree."
    document = json.loads(json.dumps(verification_json(found, name="mine"), allow_nan=False))
    assert document["agree"] and len(document["arms"][0]["steps"]) == STEPS


def test_a_difference_beyond_its_limit_is_named_with_its_step(home: Path) -> None:
    found = verified(spec_of(home, loss="simpo"))
    flat = found.arms[0]
    moved = replace(flat.steps[1], loss=flat.steps[1].loss * 1.001)
    broken = compare(flat, Arm("other", (flat.steps[0], moved, flat.steps[2])), FLOAT32)
    assert not broken.within
    assert [d.quantity for d in broken.differences if not d.within] == ["loss"]
    assert broken.differences[0].worst_step == 2
    said = verification_lines(replace(found, comparisons=(broken,)), name="mine")
    assert any("BEYOND at step 2" in line for line in said) and said[-1].endswith("do NOT agree.")


def test_a_nan_is_beyond_every_limit() -> None:
    sound = Arm("a", (VerifiedStep(1.0, 1.0, np.ones((2, 2))),))
    broken = Arm("b", (VerifiedStep(float("nan"), 1.0, np.ones((2, 2))),))
    assert not compare(sound, broken, FLOAT32).within


def test_an_arm_that_ended_early_is_beyond_every_limit() -> None:
    step = VerifiedStep(1.0, 1.0, np.ones((2, 2)))
    for made in (0, 1):
        compared = compare(Arm("a", (step, step)), Arm("b", (step,) * made), FLOAT32)
        assert not any(difference.within for difference in compared.differences)
        assert {difference.worst_step for difference in compared.differences} == {made + 1}


def test_no_spread_is_smaller_than_float32s_limit() -> None:
    same = Arm("a", (VerifiedStep(1.0, 1.0, np.ones((2, 2))),))
    limits = measured_limits(compare(same, same, FLOAT32), dtype="bfloat16")
    assert limits["logps"] == FLOAT32["logps"] and limits["grad_norm"].relative == 2**-8


def test_the_command_exits_with_the_verdict(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "spec.yaml"
    path.write_text(json.dumps(spec_of(home, loss="simpo").to_dict()))
    assert main(["verify", str(path), "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"][TRL]


def test_what_trl_sets_up_otherwise_is_refused_with_a_reason(home: Path) -> None:
    from prefopt_ray.prepare import prepare_here
    from prefopt_ray.verify.steps import verified_config

    prepared = prepare_here(spec_of(home), stage=lambda name: lambda done, total: None)
    config = verified_config(prepared, STEPS)
    sgd = replace(config, training=replace(config.training, optimizer=replace(config.training.optimizer, kind="sgd")))
    assert "sgd" in obstacle(sgd)
    assert "bfloat16" in obstacle(replace(config, adapter=replace(config.adapter, kind="qlora")))
    assert "shift_decay" in obstacle(replace(config, loss="sigmoid", loss_params={"beta": 0.1, "shift_decay": 0.9}))
