"""The solvers against the closed forms that they stand for, written out in float64 with plain inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everedit.engine.solve import Factor, rank_one_update, recursive_gain, ridge_update
from everedit.errors import NumericalError

F64 = torch.float64
EYE = torch.eye


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def second_moment(seed: int, size: int) -> Tensor:
    """A well-conditioned E[k k^T]: more vectors than dimensions, of unequal scale."""
    vectors = normal(seed, size, 4 * size) * torch.linspace(0.5, 2.0, size, dtype=F64)[:, None]
    return vectors @ vectors.T / (4 * size)


def closed_form(moment: Tensor, weight: float, keys: Tensor, residuals: Tensor) -> Tensor:
    """MEMIT's R K^T (w C + K K^T)^-1, as printed."""
    return residuals @ keys.T @ torch.linalg.inv(weight * moment + keys @ keys.T)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm().clamp_min(1e-300))


# --------------------------------------------------------------------------- factor


def test_a_factor_solves_with_the_matrix_and_its_relative_ridge() -> None:
    moment, right = second_moment(0, 12), normal(1, 12, 3)
    assert close(Factor.of(moment).solve(right), torch.linalg.inv(moment) @ right)
    ridged = moment + 0.1 * moment.diagonal().mean() * EYE(12, dtype=F64)
    assert close(Factor.of(moment, ridge=0.1).solve(right), torch.linalg.inv(ridged) @ right)


def test_a_factor_of_float32_is_made_in_float64() -> None:
    factor = Factor.of(second_moment(0, 6).float())
    assert factor.lower.dtype == F64
    assert factor.solve(torch.ones(6, 1)).dtype == F64


def test_the_matrix_is_left_as_it_was() -> None:
    moment = second_moment(0, 6)
    before = moment.clone()
    Factor.of(moment, ridge=0.5)
    assert torch.equal(moment, before)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.diag(torch.tensor([1.0, -1.0, 2.0])),
        torch.zeros(3, 3),
        torch.ones(3, 3) - 2 * EYE(3),
        torch.diag(torch.tensor([1.0, float("nan"), 1.0])),
        torch.diag(torch.tensor([1.0, float("inf"), 1.0])),
    ],
    ids=["indefinite", "zero", "off-diagonal", "nan", "inf"],
)
def test_a_matrix_that_is_not_positive_definite_is_a_numerical_error(matrix: Tensor) -> None:
    finite = bool(torch.isfinite(matrix).all())
    with pytest.raises(NumericalError, match="not positive definite" if finite else "not finite"):
        Factor.of(matrix)


def test_too_few_vectors_are_refused_without_a_ridge_and_solved_with_one() -> None:
    vectors = normal(0, 20, 5)
    singular = vectors @ vectors.T - 1e-12 * EYE(20, dtype=F64)
    with pytest.raises(NumericalError):
        Factor.of(singular)
    assert bool(torch.isfinite(Factor.of(singular, ridge=1e-3).solve(vectors)).all())


# --------------------------------------------------------------------------- ridge update (MEMIT)


@pytest.mark.parametrize(
    ("d", "h", "n"), [(8, 5, 1), (8, 5, 3), (8, 8, 8), (5, 9, 40), (48, 16, 7), (1, 1, 1), (1, 3, 5)]
)
@pytest.mark.parametrize("weight", [0.01, 1.0, 15_000.0])
def test_ridge_update_is_the_closed_form(d: int, h: int, n: int, weight: float) -> None:
    moment, keys, residuals = second_moment(d, d), normal(2, d, n), normal(3, h, n)
    delta = ridge_update(Factor.of(moment), weight, keys, residuals)
    assert delta.dense().shape == (h, d)
    assert delta.dense().dtype == F64
    assert close(delta.dense(), closed_form(moment, weight, keys, residuals))


@settings(deadline=None, max_examples=40)
@given(
    d=st.integers(1, 12),
    h=st.integers(1, 12),
    n=st.integers(1, 16),
    weight=st.floats(1e-2, 1e5),
    seed=st.integers(0, 999),
)
def test_ridge_update_is_the_closed_form_for_any_shape(d: int, h: int, n: int, weight: float, seed: int) -> None:
    moment, keys, residuals = second_moment(seed, d), normal(seed + 1, d, n), normal(seed + 2, h, n)
    delta = ridge_update(Factor.of(moment), weight, keys, residuals).dense()
    assert close(delta, closed_form(moment, weight, keys, residuals), 1e-8)


def test_ridge_update_minimises_its_objective() -> None:
    moment, keys, residuals, weight = second_moment(0, 6), normal(1, 6, 4), normal(2, 3, 4), 2.0

    def objective(delta: Tensor) -> Tensor:
        return weight * torch.trace(delta @ moment @ delta.T) + (delta @ keys - residuals).square().sum()

    best = ridge_update(Factor.of(moment), weight, keys, residuals).dense()
    for seed in range(20):
        assert objective(best) < objective(best + 1e-3 * normal(10 + seed, 3, 6))


def test_without_weight_the_keys_are_mapped_exactly() -> None:
    moment, keys, weights, residuals = second_moment(0, 20), normal(1, 20, 6), normal(2, 9, 20), normal(3, 9, 6)
    delta = ridge_update(Factor.of(moment), 1e-10, keys, residuals)
    assert close((weights + delta.dense()) @ keys, weights @ keys + residuals, 1e-8)


def test_with_infinite_weight_nothing_changes() -> None:
    moment, keys, residuals = second_moment(0, 20), normal(1, 20, 6), normal(3, 9, 6)
    norms = [ridge_update(Factor.of(moment), weight, keys, residuals).norm() for weight in (1.0, 1e6, 1e12)]
    assert norms[0] > 1e4 * norms[1] > 1e8 * norms[2]
    assert norms[2] < 1e-9


def test_a_single_fact_is_shrunk_by_s_over_one_plus_s() -> None:
    moment, key, residual = second_moment(0, 10), normal(1, 10, 1), normal(2, 4, 1)
    s = float(key.T @ torch.linalg.inv(7.0 * moment) @ key)
    delta = ridge_update(Factor.of(moment), 7.0, key, residual)
    assert close(delta.dense() @ key, residual * s / (1 + s))


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(5)))
def test_the_order_of_the_requests_does_not_matter(order: list[int]) -> None:
    factor, keys, residuals = Factor.of(second_moment(0, 8)), normal(1, 8, 5), normal(2, 6, 5)
    here = ridge_update(factor, 3.0, keys, residuals).dense()
    there = ridge_update(factor, 3.0, keys[:, order], residuals[:, order]).dense()
    assert close(there, here)


def test_scaling_the_moment_is_scaling_the_weight() -> None:
    moment, keys, residuals = second_moment(0, 8), normal(1, 8, 5), normal(2, 6, 5)
    scaled = ridge_update(Factor.of(1000.0 * moment), 0.1, keys, residuals).dense()
    assert close(scaled, ridge_update(Factor.of(moment), 100.0, keys, residuals).dense())


@pytest.mark.parametrize(("scale", "eps"), [(1.0, 0.1), (1000.0, 0.1), (1e5, 0.1)])
def test_emmet_with_a_scaled_moment_is_memit_with_weight_scale_times_eps(scale: float, eps: float) -> None:
    moment, keys, residuals = second_moment(0, 8), normal(1, 8, 5), normal(2, 6, 5)
    inverse = torch.linalg.inv(scale * moment)
    emmet = residuals @ torch.linalg.inv(keys.T @ inverse @ keys + eps * EYE(5, dtype=F64)) @ keys.T @ inverse
    assert close(ridge_update(Factor.of(moment), scale * eps, keys, residuals).dense(), emmet)


def test_one_fact_given_twice_counts_with_half_its_weight() -> None:
    moment, key, residual = second_moment(0, 8), normal(1, 8, 1), normal(2, 6, 1)
    twice = ridge_update(Factor.of(moment), 4.0, key.repeat(1, 2), residual.repeat(1, 2)).dense()
    assert close(twice, ridge_update(Factor.of(moment), 2.0, key, residual).dense())


def test_two_targets_for_one_key_are_averaged() -> None:
    moment, key, residuals = second_moment(0, 8), normal(1, 8, 1), normal(2, 6, 2)
    both = ridge_update(Factor.of(moment), 2.0, key.repeat(1, 2), residuals).dense()
    middle = residuals.mean(1, keepdim=True).repeat(1, 2)
    assert close(both, ridge_update(Factor.of(moment), 2.0, key.repeat(1, 2), middle).dense())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_a_numerical_error(bad: float) -> None:
    keys = normal(1, 8, 3)
    keys[2, 1] = bad
    with pytest.raises(NumericalError):
        ridge_update(Factor.of(second_moment(0, 8)), 1.0, keys, normal(2, 6, 3))


def test_float32_loses_on_an_ill_conditioned_moment_what_float64_keeps() -> None:
    """Why the solves are in float64: second moments of real keys have condition numbers like this one.

    Both are held against the same closed form, worked out through another route (an eigenbasis known exactly).
    """
    size = 32
    basis = torch.linalg.qr(normal(0, size, size))[0]
    values = torch.logspace(0, -8, size, dtype=F64)
    moment = (basis * values) @ basis.T
    moment = (moment + moment.T) / 2
    keys, residuals, weight = normal(1, size, 4), normal(2, 6, 4), 10.0
    inverse_keys = (basis / values) @ (basis.T @ keys) / weight
    exact = residuals @ torch.linalg.inv(EYE(4, dtype=F64) + keys.T @ inverse_keys) @ inverse_keys.T

    found = ridge_update(Factor.of(moment), weight, keys, residuals).dense()
    single = closed_form(moment.float(), weight, keys.float(), residuals.float()).double()

    assert close(found, exact, 1e-6)
    assert not close(single, exact, 1e-2)


# --------------------------------------------------------------------------- rank one (ROME)


def rome(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moment = second_moment(seed, 10)
    key = normal(seed + 1, 10)
    return moment, key, key + 0.3 * normal(seed + 2, 10), normal(seed + 3, 7)


def test_rank_one_update_is_the_closed_form() -> None:
    moment, key, write, residual = rome()
    direction = torch.linalg.inv(moment) @ key
    expected = torch.outer(residual, direction) / (direction @ write)
    delta = rank_one_update(Factor.of(moment), key, write, residual)
    assert close(delta.dense(), expected)
    assert delta.rank() == 1


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_the_written_key_is_mapped_exactly(seed: int) -> None:
    moment, key, write, residual = rome(seed)
    delta = rank_one_update(Factor.of(moment), key, write, residual)
    assert close(delta.apply(write[:, None])[:, 0], residual, 1e-8)
    assert close(delta.dense() @ write, residual, 1e-8)


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e9])
def test_scaling_the_moment_changes_nothing(scale: float) -> None:
    moment, key, write, residual = rome()
    here = rank_one_update(Factor.of(moment), key, write, residual).dense()
    assert close(rank_one_update(Factor.of(scale * moment), key, write, residual).dense(), here)


def test_scaling_the_direction_key_changes_nothing() -> None:
    moment, key, write, residual = rome()
    here = rank_one_update(Factor.of(moment), key, write, residual).dense()
    assert close(rank_one_update(Factor.of(moment), -50.0 * key, write, residual).dense(), here)


def test_what_is_orthogonal_to_the_key_under_the_inverse_moment_is_untouched() -> None:
    moment, key, write, residual = rome()
    direction = torch.linalg.inv(moment) @ key
    others = normal(9, 10, 30)
    others = others - torch.outer(direction, direction @ others) / (direction @ direction)
    delta = rank_one_update(Factor.of(moment), key, write, residual)
    assert float(delta.apply(others).norm()) < 1e-10 * float(delta.norm() * others.norm())


def test_among_exact_edits_it_moves_other_keys_least() -> None:
    """With one key in all places it minimises E||Delta k||^2 = tr(Delta C Delta^T) subject to Delta k = r."""
    moment, key, _, residual = rome()
    best = rank_one_update(Factor.of(moment), key, key, residual).dense()
    cost = torch.trace(best @ moment @ best.T)
    for seed in range(20):
        other = normal(20 + seed, 7, 10)
        other = best + 0.1 * (other - torch.outer(other @ key, key) / (key @ key))
        assert close(other @ key, residual)
        assert torch.trace(other @ moment @ other.T) > cost


def test_a_key_orthogonal_to_the_direction_is_a_numerical_error() -> None:
    moment, key, write, residual = rome()
    direction = torch.linalg.inv(moment) @ key
    orthogonal = write - direction * (direction @ write) / (direction @ direction)
    with pytest.raises(NumericalError, match="explode"):
        rank_one_update(Factor.of(moment), key, orthogonal, residual)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_zero_or_nan_key_is_a_numerical_error(bad: float) -> None:
    moment, key, _, residual = rome()
    with pytest.raises(NumericalError):
        rank_one_update(Factor.of(moment), key, torch.full((10,), bad, dtype=F64), residual)
    with pytest.raises(NumericalError):
        rank_one_update(Factor.of(moment), torch.full((10,), bad, dtype=F64), key, residual)


# --------------------------------------------------------------------------- recursive gain (SimIE)


@pytest.mark.parametrize("n", [1, 3])
def test_recursive_gain_stays_with_the_direct_solution_over_300_updates(n: int) -> None:
    size = 24
    total = 20.0 * second_moment(0, size)
    inverse = torch.linalg.inv(total)
    for step in range(300):
        keys = normal(100 + step, size, n)
        gain, inverse = recursive_gain(inverse, keys)
        total = total + keys @ keys.T
        assert close(gain, torch.linalg.solve(total, keys), 1e-8)
        assert close(inverse, torch.linalg.inv(total), 1e-8)
        assert torch.equal(inverse, inverse.T)


def test_recursive_gain_leaves_the_inverse_it_was_given() -> None:
    inverse = torch.linalg.inv(second_moment(0, 6))
    before = inverse.clone()
    recursive_gain(inverse, normal(1, 6, 2))
    assert torch.equal(inverse, before)


def test_adding_keys_one_by_one_is_adding_them_together() -> None:
    keys, start = normal(1, 8, 6), torch.linalg.inv(second_moment(0, 8))
    _, together = recursive_gain(start, keys)
    single = start
    for column in range(6):
        _, single = recursive_gain(single, keys[:, column : column + 1])
    assert close(single, together)


def test_the_gain_of_a_repeated_key_falls_like_one_over_the_count() -> None:
    key = normal(1, 8, 1)
    inverse = EYE(8, dtype=F64)
    square = float(key.T @ key)
    for count in range(1, 20):
        gain, inverse = recursive_gain(inverse, key)
        assert close(gain, key / (1 + count * square))
