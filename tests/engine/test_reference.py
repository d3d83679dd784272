"""The reference store, and references that are not the policy at step 0."""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine.oracle import slow_divergence, slow_logps
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny import PLAN, random_data, random_pairs, referenced, tiny_llama, trial_config
from transformers import PreTrainedModel

from prefopt_ray.engine.base import REFERENCE, Share
from prefopt_ray.engine.plain import PlainEngine
from prefopt_ray.engine.reference import (
    ReferenceKey,
    keep_reference,
    missing_passes,
    reference_parts,
    score_passes,
)
from prefopt_ray.errors import ModelError
from prefopt_ray.pairs.tokens import PairTokens, Ragged, SweepData
from prefopt_ray.train import make_worker, train
from prefopt_ray.trial import unpack_points

KEY = ReferenceKey(weights="w", dtype="float32", attention="sdpa", device="cpu", layout="rows")


class CountedEngine(PlainEngine):
    """Counts the pairs it scores."""

    scored = 0

    def score(self, slot: int, pairs: PairTokens, **options: object) -> np.ndarray:
        self.scored += len(pairs)
        return super().score(slot, pairs, **options)


def engine_of(model: PreTrainedModel | None = None, *, reference: PreTrainedModel | None = None) -> CountedEngine:
    return CountedEngine(
        model or tiny_llama(), plan=PLAN, pad_id=0, eos_ids=(2,),
        separate_reference=(lambda: reference) if reference is not None else None,
    )


@pytest.fixture
def data() -> SweepData:
    return random_data(24, 8)


# -- the store ---------------------------------------------------------------------------------------


def test_the_pass_is_made_once_and_read_back_to_the_last_bit(data: SweepData, tmp_path: Path) -> None:
    first, second = engine_of(), engine_of()
    made = reference_parts(first, data, KEY, cache=tmp_path)
    read = reference_parts(second, data, KEY, cache=tmp_path)
    assert (first.scored, second.scored) == (40, 0)
    for name, part in data.parts.items():
        assert np.array_equal(made[name].reference, read[name].reference)
        assert made[name].reference == pytest.approx(slow_logps(tiny_llama(), part), abs=1e-4)


def test_progress_counts_pairs_that_are_new(data: SweepData, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    reference_parts(engine_of(), data, KEY, cache=tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (40, 40)
    told.clear()
    other = replace(data, test=random_pairs(5, first_row=500))
    reference_parts(engine_of(), other, KEY, cache=tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(5, 5)]


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_shares_add_up_to_the_whole_bit_by_bit(data: SweepData, tmp_path: Path, count: int) -> None:
    plan = replace(PLAN, scoring_tokens=64)  # several forwards a part
    engines = [PlainEngine(tiny_llama(), plan=plan, pad_id=0, eos_ids=(2,)) for _ in range(2)]
    whole = reference_parts(engines[0], data, KEY, cache=None)
    missing = missing_passes(data, KEY, cache=tmp_path)
    shares = [score_passes(engines[1], missing, share=Share(number, count)) for number in range(count)]
    assert count == 1 or any((shares[0]["train"] == 0).any(1))
    kept = keep_reference(data, KEY, shares, cache=tmp_path)
    for name, part in whole.items():
        assert np.array_equal(kept[name].reference, part.reference) and (part.reference != 0).all()
    assert not missing_passes(data, KEY, cache=tmp_path)


def test_the_key_changes_with_all_that_the_numbers_depend_on_and_nothing_else() -> None:
    pairs = random_pairs(4)
    digests = {KEY.digest(pairs)}
    for change in ({"weights": "v"}, {"dtype": "bfloat16"}, {"attention": "eager"}, {"device": "cuda"}):
        digests.add(replace(KEY, **change).digest(pairs))
    for name in ("prompt", "chosen", "rejected"):
        ragged = getattr(pairs, name)
        values = ragged.values.copy()
        values[0] += 1
        digests.add(KEY.digest(replace(pairs, **{name: Ragged(values, ragged.offsets)})))
    digests.add(KEY.digest(replace(pairs, row_ids=pairs.row_ids + 1)))
    digests.add(KEY.digest(pairs.take(np.array([1, 0, 2, 3]))))
    assert len(digests) == 10
    assert KEY.digest(random_pairs(4)) == KEY.digest(pairs)
    assert {"loss", "beta", "learning_rate", "seed", "rank"}.isdisjoint(vars(KEY))


def test_a_boundary_between_completions_is_part_of_the_key() -> None:
    """The same flat token ids, cut elsewhere."""
    rows, one = np.arange(2), Ragged.from_lists([[4], [4]])
    first, second = (
        PairTokens(rows, rows, one, Ragged.from_lists(cut), one) for cut in ([[5, 6], [7]], [[5], [6, 7]])
    )
    assert KEY.digest(first) != KEY.digest(second)


def stored_file(folder: Path, part: PairTokens) -> Path:
    return folder / f"{KEY.digest(part)}.safetensors"


def test_rows_in_another_order_are_joined_by_row_id(data: SweepData, tmp_path: Path) -> None:
    made = reference_parts(engine_of(), data, KEY, cache=tmp_path)["train"]
    path = stored_file(tmp_path, data.train)
    stored = load_file(path)
    order = np.random.default_rng(0).permutation(24)
    save_file({name: np.ascontiguousarray(array[order]) for name, array in stored.items()}, path)
    engine = engine_of()
    again = reference_parts(engine, data, KEY, cache=tmp_path)["train"]
    assert engine.scored == 0
    assert np.array_equal(again.reference, made.reference)


def with_a_row_missing(path: Path) -> None:
    save_file({name: array[:-1].copy() for name, array in load_file(path).items()}, path)


def with_a_row_twice(path: Path) -> None:
    stored = load_file(path)
    stored["row_ids"] = np.concatenate([stored["row_ids"][:1], stored["row_ids"][:-1]])
    save_file(stored, path)


def with_a_nan(path: Path) -> None:
    stored = load_file(path)
    stored["logps"][3, 1] = np.nan
    save_file(stored, path)


def with_a_column_missing(path: Path) -> None:
    stored = load_file(path)
    save_file({"row_ids": stored["row_ids"], "logps": stored["logps"][:, :1].copy()}, path)


def with_other_names(path: Path) -> None:
    save_file({"rows": np.arange(3)}, path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_something_else(path: Path) -> None:
    path.write_bytes(b"not safetensors at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [with_a_row_missing, with_a_row_twice, with_a_nan, with_a_column_missing, with_other_names, truncated,
     of_something_else, empty],
)
def test_a_damaged_file_is_made_again(
    data: SweepData, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    made = reference_parts(engine_of(), data, KEY, cache=tmp_path)["train"]
    path = stored_file(tmp_path, data.train)
    damage(path)
    engine = engine_of()
    with caplog.at_level(logging.WARNING):
        again = reference_parts(engine, data, KEY, cache=tmp_path)["train"]
    assert engine.scored == 24, "this part alone"
    assert np.array_equal(again.reference, made.reference)
    assert not missing_passes(data, KEY, cache=tmp_path)
    assert str(path) in caplog.text


def test_no_temporary_files_stay_in_the_cache(data: SweepData, tmp_path: Path) -> None:
    reference_parts(engine_of(), data, KEY, cache=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_a_reference_without_finite_log_probs_is_named_by_rows(data: SweepData, tmp_path: Path) -> None:
    model = tiny_llama()
    # One token's embedding is broken; one that the engine's own check of the model does not read.
    bad, token = next((i, int(t)) for i in range(24) for t in data.train.prompt[i] if t > 10)
    model.model.embed_tokens.weight.data[token] = float("inf")
    with pytest.raises(ModelError, match=f"train part.*rows .*{data.train.row_ids[bad]}"):
        reference_parts(engine_of(model), data, KEY, cache=tmp_path)
    assert not list(tmp_path.iterdir()), "nothing unsound is kept"


# -- another reference than the policy at step 0 -----------------------------------------------------


def adapted(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a start adapter merged."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(deepcopy(model), lora).save_pretrained(folder)
    return PeftModel.from_pretrained(deepcopy(model), folder).merge_and_unload().eval()


@pytest.mark.parametrize("reference", ["base", "another model"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_log_ratios_and_kl_are_against_the_reference_that_was_chosen(
    adapter: str, reference: str, tmp_path: Path
) -> None:
    """`base` under a start adapter, or another model: a fresh policy is already away from it, and stays measured
    against it while it trains."""
    base = tiny_llama()
    policy = adapted(base, tmp_path)
    other = base if reference == "base" else tiny_llama(seed=9, layers=1)
    engine = engine_of(deepcopy(policy), reference=deepcopy(other))
    pairs = random_pairs(8)
    config = trial_config(adapter=adapter, learning_rate=1e-2)
    engine.open(0, config)
    assert engine.score(REFERENCE, pairs) == pytest.approx(slow_logps(other, pairs), abs=1e-4)
    assert engine.score(0, pairs) == pytest.approx(slow_logps(policy, pairs), abs=1e-4)
    samples = engine.sample(0, random_pairs(6, seed=2).prompt, max_new_tokens=4, seed=0)
    prompts = random_pairs(6, seed=2).prompt
    for i in np.flatnonzero(~samples.finished):
        kl, entropy, _ = slow_divergence(policy, other, prompts[int(i)], samples.completions[int(i)])
        assert samples.kl[i] == pytest.approx(kl, rel=1e-3)
        assert samples.entropy[i] == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_trial_with_another_reference_measures_its_start(adapter: str) -> None:
    """loss / L0 still begins at one on the probe, though accuracy and margins do not begin at chance."""
    engine = engine_of(tiny_llama(), reference=tiny_llama(seed=9))
    parts = referenced(engine, random_data())
    worker = make_worker(
        engine, parts, decode=str, probe_pairs=64, sample_prompts=4, reference_is_start=False
    )
    config = trial_config("ipo_sum", adapter=adapter, params={"beta": 0.5}, steps=2)
    reports = list(train(config, worker))
    probe = parts["train"]
    h = (engine_of().score(REFERENCE, probe.tokens) - probe.reference) @ np.array([1, -1])
    start = float(((h - 1.0) ** 2).mean())
    assert start != pytest.approx(1.0, abs=1e-2), "the analytic L0 would be wrong"
    (first, *_) = unpack_points(reports[1].points)
    assert first.metrics["train/loss"] / first.metrics["train/loss_norm"] == pytest.approx(start, rel=1e-4)
    assert reports[0].metrics["eval/h/std"] > 0


def test_the_separate_reference_is_loaded_once_and_only_when_it_is_needed() -> None:
    loaded: list[int] = []

    def load() -> PreTrainedModel:
        loaded.append(1)
        return tiny_llama(seed=9)

    engine = PlainEngine(tiny_llama(), plan=PLAN, pad_id=0, eos_ids=(2,), separate_reference=load)
    pairs = random_pairs(4)
    engine.open(0, trial_config())
    engine.score(0, pairs)
    assert not loaded
    engine.score(REFERENCE, pairs)
    engine.sample(0, pairs.prompt, max_new_tokens=2, seed=0)
    assert len(loaded) == 1
