"""Calibrated gain against a brute-force grid, its laws, and every degenerate input."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefopt_ray.measures.gain import calibrated_gain, calibrated_losses


def margins_with(*, effect: float, n: int, seed: int) -> np.ndarray:
    """Normal margins whose mean is `effect` standard deviations."""
    return np.random.default_rng(seed).normal(effect, 1.0, size=n)


def gain_on_grid(margins: np.ndarray) -> float:
    grid = np.concatenate([[0.0], np.geomspace(1e-5, 20 / np.median(np.abs(margins)), 20_000)])
    losses = [np.mean(np.log1p(np.exp(-np.abs(a * margins))) + np.maximum(-a * margins, 0)) for a in grid]
    return 1 - min(losses) / math.log(2)


@pytest.mark.parametrize("effect", [-0.3, 0.0, 0.05, 0.3, 1.0, 3.0])
def test_gain_is_the_best_on_a_fine_grid_of_scales(effect: float):
    margins = margins_with(effect=effect, n=200, seed=3)
    assert calibrated_gain(margins, None).gain == pytest.approx(gain_on_grid(margins), abs=1e-6)


@pytest.mark.parametrize("unit", [1e-30, 1e-3, 0.37, 1e6, 1e30])
def test_gain_and_error_do_not_depend_on_the_unit_of_margins(unit: float):
    margins = margins_with(effect=0.4, n=300, seed=4)
    one, other = calibrated_gain(margins, None), calibrated_gain(unit * margins, None)
    assert other.gain == pytest.approx(one.gain, rel=1e-9) and other.se == pytest.approx(one.se, rel=1e-7)
    assert other.scale * unit == pytest.approx(one.scale, rel=1e-7)


def test_calibration_recovers_the_temperature_of_a_bradley_terry_world():
    rng = np.random.default_rng(5)
    reward = rng.normal(0, 2, size=200_000)
    signed = np.where(rng.random(200_000) < 1 / (1 + np.exp(-reward)), reward, -reward)
    assert calibrated_gain(signed / 0.1, None).scale == pytest.approx(0.1, rel=0.02)


def test_a_small_effect_has_the_gain_its_expansion_says():
    for effect in (0.1, 0.2, 0.3):
        d_squared = effect**2
        gain = calibrated_gain(margins_with(effect=effect, n=400_000, seed=6), None).gain
        assert gain == pytest.approx(d_squared / (2 * math.log(2) * (1 + d_squared)), rel=0.1)


def test_margins_without_information_have_no_gain_and_claim_none():
    for margins in (np.zeros(50), -np.ones(50), np.array([1.0, -1.0] * 25)):
        gain = calibrated_gain(margins, None)
        assert (gain.gain, gain.se, gain.scale, gain.n) == (0.0, 0.0, 0.0, 50)


def test_perfectly_separated_pairs_have_gain_one_at_the_capped_scale():
    gain = calibrated_gain(np.array([0.5, 1.0, 2.0, 4.0, 8.0]), None)
    assert gain.scale == pytest.approx(20 / 2.0)
    assert 0.99 < gain.gain <= 1.0 and gain.valid


def test_ties_among_separated_pairs_cost_a_full_bit_each():
    assert calibrated_gain(np.array([0.0, 0.0, 0.0, 5.0]), None).gain == pytest.approx(0.25, abs=1e-6)


def test_one_pair_or_one_cluster_has_an_error_as_wide_as_the_scale():
    assert calibrated_gain(np.array([3.0]), None).se == 1.0
    assert calibrated_gain(np.array([3.0, -1.0, 2.0]), np.array([5, 5, 5])).se == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_finite_makes_the_gain_invalid_but_finite(bad: float):
    gain = calibrated_gain(np.array([1.0, bad, 2.0]), None)
    assert (gain.gain, gain.se, gain.scale, gain.n, gain.valid) == (-1.0, 1.0, 0.0, 3, False)


@pytest.mark.parametrize("shape", [(0,), (3, 2)])
def test_margins_that_are_no_vector_of_pairs_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="at least one pair"):
        calibrated_gain(np.zeros(shape), None)


def test_one_enormous_outlier_does_not_hide_the_optimum():
    margins = np.append(np.ones(99), -1e30)
    assert calibrated_gain(margins, None).gain == 0.0  # its mean is negative: no scale helps
    gain = calibrated_gain(np.append(np.full(99, 1e29), -1.0), None)
    assert gain.gain == pytest.approx(0.99, abs=1e-3)
    wide = np.append(margins_with(effect=0.5, n=99, seed=7), 1e30)
    assert calibrated_gain(wide, None).gain == pytest.approx(gain_on_grid(wide), abs=1e-5)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40))
def test_gain_is_between_zero_and_one_and_no_scale_beats_it(margins: list[float]):
    margins = np.array(margins)
    result = calibrated_gain(margins, None)
    assert 0.0 <= result.gain <= 1.0 and math.isfinite(result.se) and math.isfinite(result.scale)
    for scale in (0.3 * result.scale, 0.9 * result.scale, 0.999 * result.scale):
        other = 1 - calibrated_losses(margins, scale).mean() / math.log(2)
        assert result.gain >= other - 1e-9


def test_clustered_error_is_larger_when_pairs_of_a_prompt_agree():
    rng = np.random.default_rng(8)
    groups = np.repeat(np.arange(100), 4)
    margins = 0.4 + rng.normal(size=100)[groups] + 0.1 * rng.normal(size=400)
    alone, clustered = calibrated_gain(margins, None), calibrated_gain(margins, groups)
    assert clustered.gain == alone.gain
    assert clustered.se == pytest.approx(2 * alone.se, rel=0.15)  # four nearly equal pairs per prompt


def test_calibrated_losses_are_ln2_at_scale_zero_and_linear_far_out():
    margins = np.array([-1e6, -3.0, 0.0, 1e6])
    assert calibrated_losses(margins, 0.0).tolist() == [math.log(2)] * 4
    assert calibrated_losses(margins, 2.0) == pytest.approx([2e6, 6 + math.log1p(math.exp(-6)), math.log(2), 0.0])


def test_gain_verdicts_and_comparisons_work_without_torch():
    modules = "gain, clustered, verdicts, compare"
    code = f"import sys; from prefopt_ray.measures import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
