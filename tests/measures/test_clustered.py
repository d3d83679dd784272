"""Clustered means and Student quantiles against closed forms, published tables and numerical integration."""

import math

import numpy as np
import pytest

from prefopt_ray.measures.clustered import clustered_mean, student_quantile


def test_without_clusters_the_error_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=50)
    result = clustered_mean(values, None)
    assert result.mean == pytest.approx(values.mean())
    assert result.se == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert (result.n, result.clusters) == (50, 50)
    assert clustered_mean(values, np.arange(50) * 7) == result


def test_clusters_of_identical_copies_count_as_one_pair_each():
    values = np.random.default_rng(1).normal(size=40)
    once = clustered_mean(values, None)
    copied = clustered_mean(np.repeat(values, 5), np.repeat(np.arange(40), 5))
    assert copied.se == pytest.approx(once.se) and copied.n == 200 and copied.clusters == 40


def test_order_of_pairs_and_names_of_groups_do_not_matter():
    rng = np.random.default_rng(2)
    values, groups = rng.normal(size=60), rng.integers(0, 20, size=60)
    order = rng.permutation(60)
    shuffled = clustered_mean(values[order], (1000 - 3 * groups)[order])
    assert shuffled.se == pytest.approx(clustered_mean(values, groups).se, rel=1e-12)


def test_one_cluster_has_an_infinite_error():
    assert clustered_mean(np.array([1.0]), None).se == math.inf
    assert clustered_mean(np.array([1.0, 2.0]), np.array([3, 3])).se == math.inf


@pytest.mark.parametrize(("values", "groups"), [([], None), ([[1.0]], None), ([1.0, 2.0], [1])])
def test_values_that_cannot_be_averaged_are_refused(values: list, groups: list | None):
    with pytest.raises(ValueError, match="shape"):
        clustered_mean(np.array(values), None if groups is None else np.array(groups))


@pytest.mark.parametrize(
    ("probability", "degrees", "table"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.995, 4, 4.60409), (0.95, 5, 2.01505),
     (0.975, 10, 2.22814), (0.995, 30, 2.75000), (0.975, 120, 1.97993), (0.5, 7, 0.0), (0.025, 10, -2.22814)],
)  # fmt: skip
def test_student_quantiles_agree_with_published_tables(probability: float, degrees: int, table: float):
    assert student_quantile(probability, degrees) == pytest.approx(table, abs=6e-5)


@pytest.mark.parametrize("degrees", [6, 33, 200, 201, 5000])
def test_student_quantile_inverts_the_integrated_density(degrees: int):
    t = np.linspace(0, student_quantile(0.9975, degrees), 200_001)
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = constant * (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    assert 0.5 + np.trapezoid(density, t) == pytest.approx(0.9975, abs=1e-9)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_quantiles_that_do_not_exist_are_refused(probability: float, degrees: int):
    with pytest.raises(ValueError, match="needs 0 < probability < 1"):
        student_quantile(probability, degrees)
