"""Factors of a change against the plain singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everedit.export import factors
from everedit.export.factors import factorised, rounding
from everedit.patch import Dense, LowRank


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(rank: int, rows: int = 96, columns: int = 200) -> LowRank:
    return LowRank(random(rows, rank), random(columns, rank, seed=1))


@pytest.mark.parametrize("rank", [1, 7, 60])
@pytest.mark.parametrize("flat", [False, True])
def test_a_low_rank_is_found_and_kept_exactly(rank: int, flat: bool) -> None:
    low = product(rank)
    found = factorised(Dense(low.dense()) if flat else low)
    assert (found.rank, found.width) == (rank, rank)
    assert found.relative_error < 1e-13
    torch.testing.assert_close(found.left @ found.right.T, low.dense(), rtol=1e-10, atol=1e-10)
    # Both sides carry half of each singular value.
    values = torch.linalg.svdvals(low.dense())[:rank]
    for side in (found.left, found.right):
        torch.testing.assert_close(side.T @ side, torch.diag(values), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("most", [1, 4, 39])
def test_a_cut_keeps_the_largest_and_says_what_it_lost(most: int) -> None:
    matrix = random(40, 90)
    found = factorised(Dense(matrix), most=most)
    values = torch.linalg.svdvals(matrix)
    assert (found.rank, found.width) == (40, most)
    best = float(values[most:].norm() / values.norm())
    assert found.relative_error == pytest.approx(best, rel=1e-12)
    assert float((found.left @ found.right.T - matrix).norm() / matrix.norm()) == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize("rank", [3, 20])
def test_a_sketch_sees_what_the_whole_decomposition_sees(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A low rank under rounding: the same rank, error and product, whichever way they are found."""
    base = random(300, 160).float()
    delta = 0.05 * random(300, rank) @ random(rank, 160, seed=2)
    rounded = Dense((base.double() + delta).float().double() - base.double())
    noise = rounding(base.double() + delta, torch.float32)
    sketched = factorised(rounded, noise)
    monkeypatch.setattr(factors, "_SKETCHES", ())
    whole = factorised(rounded, noise)
    assert sketched.rank == whole.rank == rank
    # No matrix of that rank is nearer than the whole decomposition's; the sketch's is nearly so, and says how near.
    assert whole.relative_error <= sketched.relative_error < 1.3 * whole.relative_error < 1e-5
    matrix = rounded.matrix
    error = float((sketched.left @ sketched.right.T - matrix).norm() / matrix.norm())
    assert sketched.relative_error == pytest.approx(error, rel=1e-3)


def test_no_sketch_is_taken_that_leaves_out_more_than_rounding() -> None:
    """Rank 40 does not fit into a sketch of 16 columns; a full rank fits into none."""
    for rank in (40, 200):
        matrix = random(300, rank) @ random(rank, 200, seed=3)
        found = factorised(Dense(matrix), 1e-6)
        assert found.rank == rank
        assert float((found.left @ found.right.T - matrix).norm()) < 1e-6


def test_rounding_is_bounded_and_not_by_far() -> None:
    weight = random(200, 200)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        real = float((weight.to(dtype).double() - weight).norm())
        assert 0.2 * rounding(weight, dtype) < real < rounding(weight, dtype)
    now = weight
    for step in range(50):
        now = (now + 0.01 * random(200, 200, seed=step)).float().double()
    exact = weight + sum(0.01 * random(200, 200, seed=step) for step in range(50))
    assert float((now - exact).norm()) < rounding(now, torch.float32, 50)


def test_nothing_has_rank_zero() -> None:
    for delta in (Dense(torch.zeros(40, 50)), LowRank(torch.zeros(40, 2), torch.zeros(50, 2))):
        found = factorised(delta, 1e-6)
        assert (found.rank, found.width, found.relative_error) == (0, 0, 0.0)
