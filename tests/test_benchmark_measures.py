"""What benchmarks count, summarise and keep: a wrong formula there makes every published number wrong."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.flops import PaddedStep, necessary_flops, padded_flops
from benchmarks.kept_runs import KeptRuns, OtherSettings
from benchmarks.model_shapes import MODELS, ModelShape, random_model
from benchmarks.pair_lengths import SHAPES, LengthShape, padding_factor, pair_lengths, random_pairs
from benchmarks.parity import FLOAT32, Difference, float32_limits, largest_relative
from benchmarks.process_tree import spent_by
from benchmarks.sweep import Clock, OutOfTimeError
from benchmarks.timing import paired_ratio

TOY = ModelShape("toy", layers=2, hidden=4, intermediate=6, heads=2, kv_heads=1, vocabulary=10)


# -- operations ------------------------------------------------------------------------------------


def test_necessary_flops_of_a_toy_model_are_those_counted_by_hand() -> None:
    """Prompt 3, chosen 2, rejected 1: 4 tokens go in (of an answer's last one nothing is predicted), and of 2 of them
    something is predicted: of the prompt's last both answers' first, of chosen's first its second. Two layers, rank 1.
    """
    # In x out of the frozen linears: q 4x4, k 4x2, v 4x2, o 4x4, gate 4x6, up 4x6, down 6x4.
    weights = 16 + 8 + 8 + 16 + 24 + 24 + 24
    # First layer, every token: forward 2, input gradient 2, but the latter not through q, k, v, below which nothing learns.
    first = 4 * (4 * weights - 2 * (16 + 8 + 8))
    # Last layer: q, k, v for all tokens, the rest for the 2 that predict.
    last = 4 * 4 * (16 + 8 + 8) + 2 * 4 * (16 + 24 + 24 + 24)
    # Adapters of rank 1, in + out parameters: forward 2, input gradient 2, weight gradient 2; x's own gradient through
    # the first factor is not needed below the first layer's q, k, v.
    widths = {"q": 8, "k": 6, "v": 6, "o": 8, "gate": 10, "up": 10, "down": 10}
    adapters = 4 * (6 * sum(widths.values()) - 2 * (4 + 4 + 4))
    adapters += 4 * 6 * (8 + 6 + 6) + 2 * 6 * (8 + 10 + 10 + 10)
    # Half of each token's own row and column: prompt with itself, answers with the prompt and with themselves.
    seen = 3 * 3 / 2 + 3 * (1 + 0) + (1 * 1 + 0 * 0) / 2
    attention = 2 * (1 + 2) * 4 * 4 * seen
    head = 2 * 2 * 2 * 4 * 10
    assert necessary_flops(TOY, np.array([[3, 2, 1]]), rank=1) == first + last + adapters + attention + head


def test_a_frozen_linear_is_counted_for_forward_and_input_gradient_as_torch_counts_it() -> None:
    """Without adapters, attention and head, and far from both ends of the model: against torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    deep, shallow = (ModelShape("toy", layers, 32, 48, 4, 2, 16) for layers in (4, 3))
    lengths = np.array([[5, 4, 3]])  # 10 tokens go in
    counted = necessary_flops(deep, lengths, rank=0) - necessary_flops(shallow, lengths, rank=0)
    layer = random_model(deep, device=torch.device("cpu")).model.layers[1]
    states = torch.randn(10, 32, requires_grad=True)
    linears = [module.requires_grad_(requires_grad=False) for module in layer.modules()
               if isinstance(module, torch.nn.Linear)]
    with FlopCounterMode(display=False) as counter:
        for linear in linears:
            inputs = states if linear.in_features == 32 else torch.randn(10, 48, requires_grad=True)
            linear(inputs).sum().backward()
    attention = 3 * 4 * 32 * (5**2 / 2 + 5 * 5 + (3**2 + 2**2) / 2)
    assert counted - attention == counter.get_total_flops()


@pytest.mark.parametrize(("model", "tera"), [("qwen2.5-0.5b", 1.855), ("llama-3.2-1b", 4.604), ("qwen2.5-7b", 27.99)])
def test_necessary_flops_grow_with_the_model_as_its_parameters_say(model: str, tera: float) -> None:
    """512 prompt and twice 256 completion tokens: about four operations per token and frozen parameter."""
    counted = necessary_flops(MODELS[model], np.array([[512, 256, 256]]), rank=8)
    assert counted == pytest.approx(tera * 1e12, rel=1e-3)


def test_pairs_add_up() -> None:
    lengths = SHAPES["hh"].draw(20)
    one_by_one = sum(necessary_flops(TOY, row[None], rank=8) for row in lengths)
    assert necessary_flops(TOY, lengths, rank=8) == pytest.approx(one_by_one, rel=1e-12)


def test_padded_rows_of_a_toy_model_cost_what_is_counted_by_hand() -> None:
    """Two pairs, both rows padded to 4 tokens; reference and recomputation on top; the head scores 16 or 4 places."""
    lengths = np.array([[3, 1, 1], [1, 1, 1]])
    weights, adapter = 2 * 120, 2 * 58
    frozen, adapters = 2 * weights * 16, 2 * adapter * 16
    attention = 2 * 4 * 4 * (4 * 4 * 4 / 2)
    forward = frozen + adapters + attention
    bare = forward + frozen + 2 * adapters + 2.5 * attention
    whole = PaddedStep(reference=True, recomputed=True, scores_padding=True)
    lean = PaddedStep(reference=False, recomputed=False, scores_padding=False)
    logits = 2 * 4 * 10
    assert padded_flops(TOY, lengths, rank=1, batch=2, step=lean) == bare + 3 * 4 * logits
    assert padded_flops(TOY, lengths, rank=1, batch=2, step=whole) == (
        bare + forward + frozen + attention + 4 * 16 * logits
    )


# -- lengths ---------------------------------------------------------------------------------------


def test_hh_lengths_have_the_padding_that_real_ones_have() -> None:
    """Measured on hh-rlhf's harmless-base test rows, random order."""
    lengths = SHAPES["hh"].draw(40_000)
    assert lengths.mean(0) == pytest.approx([116, 40, 50], rel=0.02)
    for batch, factor in {2: 1.53, 4: 2.03, 8: 2.59, 16: 3.18}.items():
        assert padding_factor(lengths, batch=batch) == pytest.approx(factor, rel=0.04)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_the_few_batches_that_are_timed_are_typical(shape: LengthShape) -> None:
    lengths = shape.draw_typical(4)
    assert lengths.mean(0) == pytest.approx([shape.prompt, shape.chosen, shape.rejected], rel=0.06)
    assert padding_factor(lengths, batch=shape.batch_pairs) == pytest.approx(shape.padding, rel=0.06)
    assert (lengths[:, 0] + lengths[:, 1:].max(1)).max() <= shape.max_tokens


def test_padding_factor_is_padded_over_real_tokens() -> None:
    lengths = np.array([[2, 1, 2], [4, 3, 1]])  # rows of 3, 4, 7, 5 tokens, all padded to 7
    assert padding_factor(lengths, batch=2) == 28 / 19


def test_random_pairs_have_the_lengths_asked_for_and_end() -> None:
    lengths = SHAPES["hh"].draw(10)
    pairs = random_pairs(lengths, vocabulary=50)
    assert np.array_equal(pair_lengths(pairs), lengths)
    assert all(pairs.chosen[i][-1] == 2 and pairs.rejected[i][-1] == 2 for i in range(10))
    assert pairs.prompt.values.min() >= 3 and pairs.prompt.values.max() < 50


# -- statistics ------------------------------------------------------------------------------------


def test_ratios_are_formed_within_rounds_before_they_are_summarised() -> None:
    """The second round met a machine half as fast: both took twice as long, and the ratio stays."""
    ratio = paired_ratio([6.0, 12.0, 8.0], [2.0, 4.0, 2.0])
    assert (ratio.median, ratio.least, ratio.most) == (3.0, 3.0, 4.0)


@pytest.mark.parametrize(("slower", "faster"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_a_ratio_needs_pairs_of_positive_times(slower: list[float], faster: list[float]) -> None:
    with pytest.raises(ValueError):
        paired_ratio(slower, faster)


def test_parity_is_the_worst_step_and_never_passes_on_nothing() -> None:
    assert largest_relative([1.0, 2.002], [1.0, 2.0]) == pytest.approx(1e-3)
    for ours, theirs in (([], []), ([1.0], [1.0, 1.0]), ([float("nan")], [1.0]), ([1.0], [float("nan")])):
        assert largest_relative(ours, theirs) == float("inf")
    assert Difference(loss=1e-6, grad_norm=1e-5).within(FLOAT32)
    assert not Difference(loss=1e-6, grad_norm=2e-4).within(FLOAT32)


def test_the_limit_of_a_loss_is_what_float32_can_tell_apart() -> None:
    """400 nats: the usual limit. 3000 nats: neighbouring float32 numbers are 2.4e-4 apart."""
    assert float32_limits(400.0, beta=0.1) == FLOAT32
    spacing = float(np.spacing(np.float32(3000.0)))
    assert float32_limits(3000.0, beta=0.1).loss == pytest.approx(0.1 * spacing / np.log(2))


# -- runs ------------------------------------------------------------------------------------------


def test_a_second_start_makes_only_the_runs_that_are_missing(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> dict[str, float]:
        made.append(name)
        return {"wall_s": len(made)}

    first = KeptRuns.open(tmp_path / "out", {"data": "hh"})
    first.get_or_make("a", lambda: make("a"))
    (tmp_path / "out" / "b.partial").write_text("{")  # a run that was cut off while it was written
    again = KeptRuns.open(tmp_path / "out", {"data": "hh"})
    assert again.get_or_make("a", lambda: make("a")) == {"wall_s": 1}
    assert again.get_or_make("b", lambda: make("b")) == {"wall_s": 2}
    assert made == ["a", "b"]


def test_a_run_that_fails_is_not_kept(tmp_path: Path) -> None:
    kept = KeptRuns.open(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        kept.get_or_make("a", lambda: {"x": 1 / 0})
    assert not kept.has("a")


def test_runs_made_with_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    KeptRuns.open(tmp_path, {"data": "hh", "steps": 60})
    with pytest.raises(OtherSettings, match="steps"):
        KeptRuns.open(tmp_path, {"data": "hh", "steps": 20})


BUSY = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cpu_seconds_hold_those_of_orphans_that_left_the_session(tmp_path: Path) -> None:
    """As Ray's daemons do: the child lives in a session of its own, and its parent does not wait for it."""
    script = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {BUSY!r}], start_new_session=True)\n"
    )
    spent = spent_by([sys.executable, "-c", script], cwd=tmp_path, log=tmp_path / "log", env={})
    assert 0.45 < spent.cpu_s < 1.2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_command_that_fails_says_how_it_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match="no such model"):
        spent_by(command, cwd=tmp_path, log=tmp_path / "log", env={})


def test_a_sweep_begins_nothing_that_would_end_too_late() -> None:
    clock = Clock(0.3)
    assert clock.timed(lambda: {"done": time.sleep(0.2) is None}) == {"done": True}
    with pytest.raises(OutOfTimeError):
        clock.timed(dict)
