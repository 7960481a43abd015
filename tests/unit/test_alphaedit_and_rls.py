"""AlphaEdit and RLSEdit on one matrix with keys and values given: each change is the minimiser that its paper states,
found here a second time as one stacked least-squares problem or with plain inverses, all in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import eigvalsh, inv, lstsq

from everedit.engine.moments import SecondMoment
from everedit.engine.state import Growing
from everedit.errors import NumericalError
from everedit.methods import method_class
from everedit.methods._spread import SpreadMethod

D, H, EMPTY = 16, 5, 6  # width of a key, width of a value, directions that ordinary keys never take
EYE = torch.eye(D, dtype=torch.float64)
Batch = tuple[Tensor, Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_moment() -> Tensor:
    keys = normal(0, D, 4 * D) * torch.linspace(0.5, 2.0, D, dtype=torch.float64)[:, None]
    return keys @ keys.T / (4 * D)


def ordinary_keys() -> Tensor:
    """Keys that span all but EMPTY dimensions."""
    return normal(1, D, D - EMPTY) @ normal(2, D - EMPTY, 40)


def singular_moment() -> Tensor:
    keys = ordinary_keys()
    return keys @ keys.T / keys.shape[1]


def projector(moment: Tensor, threshold: float) -> Tensor:
    """P by the paper's SVD, as an explicit matrix."""
    left, sizes, _ = torch.linalg.svd(moment)
    null = left[:, sizes < threshold]
    return null @ null.T


def root(moment: Tensor) -> Tensor:
    """A square S with S S^T = C."""
    left, sizes, _ = torch.linalg.svd(moment)
    return left * sizes.sqrt()


def minimiser(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """argmin_X of the sum of ||X A - B||^2 over ``terms`` (A, B): one tall system, by QR, with no Gram matrix."""
    return lstsq(torch.cat([a.T for a, _ in terms]), torch.cat([b.T for _, b in terms])).solution.T


def joined(batches: Sequence[Batch]) -> Batch:
    keys, values = zip(*batches, strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def batches_of(*sizes: int) -> list[Batch]:
    return [(normal(10 + i, D, n), normal(5000 + i, H, n)) for i, n in enumerate(sizes)]


def made(name: str, **settings: Any) -> SpreadMethod:
    kind: Any = method_class(name)
    return kind(kind.Config(layers=(0,), **settings))


class Stream:
    """One matrix, edited batch after batch towards absolute values, with the method's tensors carried along."""

    def __init__(self, method: SpreadMethod, moment: Tensor, hair: float = 0.0) -> None:
        # No hair's breadth of ridge unless asked for: what is compared here is exact.
        held = SecondMoment(0, moment, 1000, ridge=hair)
        self.bench: Any = SimpleNamespace(moments=SimpleNamespace(get=lambda layers: dict.fromkeys(layers, held)))
        self.method, self.tensors = method, Growing()
        self.base = normal(99, H, len(moment))
        self.now = self.base.clone()

    def edit(self, keys: Tensor, values: Tensor) -> Tensor:
        """Make one batch and return its change."""
        update = self.method.solve(self.bench, 0, keys, values - self.now @ keys, self.tensors)
        assert update.left.dtype == update.right.dtype == torch.float64
        assert update.right.shape == keys.shape
        self.now = self.now + update.dense()
        return update.dense()

    def run(self, batches: Sequence[Batch]) -> Tensor:
        """Make all batches and return the whole shift."""
        for keys, values in batches:
            self.edit(keys, values)
        return self.now - self.base


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm().clamp_min(1e-300))


# --------------------------------------------------------------------------- AlphaEdit


def alphaedit(moment: Tensor, *, threshold: float = 1e-6, ridge: float = 0.5, **settings: Any) -> Stream:
    return Stream(made("alphaedit", threshold=threshold, ridge=ridge, **settings), moment)


def alphaedit_jointly(batches: Sequence[Batch], base: Tensor, p: Tensor, ridge: float) -> Tensor:
    """argmin ||(W + X P) K - V||^2 + ridge ||X||^2 over all batches at once."""
    keys, values = joined(batches)
    return minimiser((p @ keys, values - base @ keys), (ridge**0.5 * EYE, torch.zeros(H, D).double())) @ p


def test_alphaedits_projector_is_onto_the_null_space_and_nothing_else() -> None:
    stream = alphaedit(singular_moment())
    found = stream.method.projector(stream.bench, 0)  # type: ignore[attr-defined]
    assert close(found, found.T)
    assert close(found @ found, found)
    assert torch.linalg.matrix_rank(found) == EMPTY
    assert close(found, projector(singular_moment(), 1e-6))


def test_the_threshold_is_on_the_mean_second_moments_eigenvalues() -> None:
    moment = full_moment()
    sizes = eigvalsh(moment)
    for kept in (1, 7, D):
        stream = alphaedit(moment, threshold=float(sizes[kept - 1 : kept + 1].mean()) if kept < D else 1e9)
        p = projector(moment, stream.method.config.threshold)  # type: ignore[attr-defined]
        assert torch.linalg.matrix_rank(p) == kept
        change = stream.edit(*batches_of(3)[0])
        assert close(change @ p, change)


def test_what_ordinary_keys_are_mapped_to_does_not_move() -> None:
    stream, ordinary = alphaedit(singular_moment()), ordinary_keys()
    p = projector(singular_moment(), 1e-6)
    for keys, values in batches_of(1, 4, 9):
        change = stream.edit(keys, values)
        assert (change @ keys).norm() > 0.1
        assert close(change @ p, change)
        assert (change @ ordinary).norm() < 1e-12 * change.norm() * ordinary.norm()


@pytest.mark.parametrize("ridge", [0.01, 10.0])
@pytest.mark.parametrize("sizes", [(1,), (3, 1, 2), (20, 20)])
def test_alphaedit_is_equation_14_in_each_of_its_forms(sizes: tuple[int, ...], ridge: float) -> None:
    """As printed, as the released code solves it, and in the reduced basis, with the sum over earlier keys as it is."""
    moment, previous = full_moment(), torch.zeros(D, D).double()
    stream = alphaedit(moment, threshold=1.0, ridge=ridge)
    p = projector(moment, 1.0)
    assert 1 < p.trace() < D - 1
    null = torch.linalg.svd(p)[0][:, : round(float(p.trace()))]
    for keys, values in batches_of(*sizes):
        residual = values - stream.now @ keys
        printed = residual @ keys.T @ p @ inv(previous @ p + keys @ keys.T @ p + ridge * EYE)
        released = torch.linalg.solve(p @ (keys @ keys.T + previous) + ridge * EYE, p @ keys @ residual.T).T
        small = inv(null.T @ (keys @ keys.T + previous) @ null + ridge * torch.eye(null.shape[1]).double())
        change = stream.edit(keys, values)
        for expected in (printed, released, residual @ keys.T @ null @ small @ null.T):
            assert close(change, expected, 1e-11)
        previous += keys @ keys.T


@pytest.mark.parametrize("moment", [full_moment(), singular_moment()], ids=["full", "singular"])
def test_alphaedits_batches_are_one_joint_edit_unless_earlier_keys_are_dropped(moment: Tensor) -> None:
    batches, kept = batches_of(2, 1, 5), alphaedit(moment, threshold=1.0)
    joint = alphaedit_jointly(batches, kept.base, projector(moment, 1.0), 0.5)
    assert close(kept.run(batches), joint)
    dropped = alphaedit(moment, threshold=1.0, keep_previous=False)
    assert not close(dropped.run(batches), joint, 0.05)
    assert dropped.tensors == {}
    # A single batch has no history, so that there the two are the same.
    ways = [alphaedit(moment, threshold=1.0, keep_previous=keep).edit(*joined(batches)) for keep in (True, False)]
    assert torch.equal(*ways)
    assert close(ways[0], joint)


def test_alphaedits_order_plays_no_part_unless_earlier_keys_are_dropped() -> None:
    moment, batches = full_moment(), batches_of(2, 1, 3, 1)
    shifts = [
        [alphaedit(moment, threshold=1.0, keep_previous=keep).run(order) for order in (batches, batches[::-1])]
        for keep in (True, False)
    ]
    assert close(*shifts[0], 1e-11)
    assert not close(*shifts[1], 0.05)


def test_alphaedit_carries_the_gram_matrix_of_all_earlier_keys() -> None:
    moment, batches = full_moment(), batches_of(2, 3, 1)
    stream, ridge = alphaedit(moment, threshold=1.0, ridge=0.3), 0.3
    p = projector(moment, 1.0)
    for index, (keys, values) in enumerate(batches):
        stream.edit(keys, values)
        seen = joined(batches[: index + 1])[0]
        [carried] = stream.tensors.values()
        assert close(carried, p @ inv(p @ seen @ seen.T @ p + ridge * EYE) @ p, 1e-11)


@pytest.mark.parametrize("weight", [0.1, 30.0])
def test_alphaedit_without_a_null_space_to_keep_to_is_memit(weight: float) -> None:
    """P = I, no earlier keys, and lambda C for the ridge: C is the identity in whitened coordinates."""
    moment, [(keys, residual)] = full_moment(), batches_of(4)
    lower = torch.linalg.cholesky(moment)
    stream = alphaedit(EYE, threshold=2.0, ridge=weight)
    whitened = inv(lower) @ keys
    change = stream.edit(whitened, stream.now @ whitened + residual) @ inv(lower)
    assert close(change, residual @ keys.T @ inv(weight * moment + keys @ keys.T), 1e-11)


def test_alphaedit_without_a_ridge_writes_exactly_and_under_a_heavy_one_nothing() -> None:
    moment, [(keys, values)] = singular_moment(), batches_of(EMPTY)
    norms = []
    for ridge in (1e-13, 1.0, 1e4, 1e8, 1e12):
        stream = alphaedit(moment, ridge=ridge)
        norms.append(float(stream.edit(keys, values).norm()))
        # There is room for as many independent keys as the null space has directions.
        assert close(stream.now @ keys, values, 1e-8) == (ridge == 1e-13)
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-9 < norms[0]


@pytest.mark.parametrize("moment", [full_moment(), singular_moment()], ids=["full", "singular"])
def test_a_threshold_of_zero_leaves_alphaedit_nowhere_to_write(moment: Tensor) -> None:
    """Rounding puts zero eigenvalues on either side of zero; no second moment is really below it."""
    stream, [(keys, values)] = alphaedit(moment, threshold=0.0), batches_of(2)
    with pytest.raises(NumericalError, match="nowhere to write") as caught:
        stream.edit(keys, values)
    named = float(str(caught.value).rpartition("the smallest is ")[2].split()[0])
    assert named == pytest.approx(float(eigvalsh(moment)[0]), rel=1e-2, abs=1e-12)
    assert stream.tensors == {}
    assert torch.equal(stream.now, stream.base)


# --------------------------------------------------------------------------- RLSEdit


def rlsedit(moment: Tensor, *, lam: float = 0.3, mu: float = 0.7, weight: float = 2.0) -> Stream:
    return Stream(made("rlsedit", lam=lam, mu=mu, moment_weight=weight), moment)


def rls_jointly(batches: Sequence[Batch], base: Tensor, moment: Tensor, lam: float, mu: float, weight: float) -> Tensor:
    """argmin ||W K - V||^2 + lam^2 ||W - W_0||^2 + mu^2 weight ||(W - W_0) C^1/2||^2 over all batches at once."""
    anchors = (lam * EYE, lam * base), (mu * weight**0.5 * root(moment), mu * weight**0.5 * base @ root(moment))
    return minimiser(*batches, *anchors)


def information(moment: Tensor, stream: Stream, batches: Sequence[Batch]) -> Tensor:
    c: Any = stream.method.config
    return sum((k @ k.T for k, _ in batches), c.lam**2 * EYE + c.mu**2 * c.moment_weight * moment)


@pytest.mark.parametrize(("lam", "mu"), [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0), (5.0, 0.1)])
@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1, 1), (3, 20, 1)])
def test_rlsedit_is_the_minimiser_over_all_batches_so_far(sizes: tuple[int, ...], lam: float, mu: float) -> None:
    moment, batches = full_moment(), batches_of(*sizes)
    stream = rlsedit(moment, lam=lam, mu=mu)
    for index, batch in enumerate(batches):
        stream.edit(*batch)
        joint = rls_jointly(batches[: index + 1], stream.base, moment, lam, mu, 2.0)
        assert (joint - stream.base).norm() > 0.1
        assert close(stream.now, joint)


def test_rlsedit_carries_the_inverse_information_matrix() -> None:
    moment, batches = full_moment(), batches_of(2, 1, 4)
    stream = rlsedit(moment)
    before = inv(information(moment, stream, []))
    for index, (keys, values) in enumerate(batches):
        residual = values - stream.now @ keys
        change = stream.edit(keys, values)
        [carried] = stream.tensors.values()
        assert close(carried, inv(information(moment, stream, batches[: index + 1])))
        assert torch.equal(carried, carried.T)
        # Both forms of the gain: that of the new matrix, and F S^-1 with the old one.
        f = before @ keys
        assert close(change, residual @ (carried @ keys).T, 1e-11)
        assert close(change, residual @ (f @ inv(torch.eye(keys.shape[1]).double() + keys.T @ f)).T, 1e-11)
        sizes = eigvalsh(carried)
        assert bool(((sizes > 0) & (sizes <= eigvalsh(before) * (1 + 1e-12))).all())
        before = carried


def test_a_second_batch_starts_from_what_the_first_left_behind() -> None:
    """The released RLSEdit restarts at every batch; so would either method if its tensors did not come back to it."""
    for stream in (rlsedit(full_moment()), alphaedit(full_moment(), threshold=1.0)):
        first, second = batches_of(3, 2)
        stream.edit(*first)
        carried, now = Growing(stream.tensors), stream.now
        going_on = stream.edit(*second)
        assert stream.tensors.keys() == carried.keys() == {"inverse|0"}
        assert not torch.equal(stream.tensors["inverse|0"], carried["inverse|0"])
        stream.now, stream.tensors = now, Growing()
        assert not close(stream.edit(*second), going_on, 0.05)
        # What was carried was not changed in place: from it everything is the same again.
        stream.now, stream.tensors = now, carried
        assert torch.equal(stream.edit(*second), going_on)


def test_splitting_and_reordering_change_nothing_for_rlsedit() -> None:
    moment, batches = full_moment(), batches_of(2, 1, 3)
    whole = rlsedit(moment)
    whole.edit(*joined(batches))
    one_by_one = list(zip(*(part.split(1, dim=1) for part in joined(batches)), strict=True))
    for order in (batches, batches[::-1], one_by_one, one_by_one[::-1]):
        parts = rlsedit(moment)
        parts.run(order)
        assert close(parts.now, whole.now)
        assert close(parts.tensors["inverse|0"], whole.tensors["inverse|0"])


def test_rlsedit_that_keeps_to_the_mapping_alone_is_memit_with_all_earlier_keys() -> None:
    moment, weight, batches = full_moment(), 3.0, batches_of(2, 1, 4)
    stream, memit = rlsedit(moment, lam=0.0, mu=1.0, weight=weight), Stream(made("memit", moment_weight=weight), moment)
    previous = torch.zeros(D, D).double()
    for index, (keys, values) in enumerate(batches):
        expected = (values - stream.now @ keys) @ keys.T @ inv(weight * moment + previous + keys @ keys.T)
        assert close(stream.edit(keys, values), expected, 1e-11)
        # MEMIT itself forgets, so that it is the same for the first batch and no longer.
        assert close(memit.edit(keys, values), expected, 1e-11) == (index == 0)
        previous += keys @ keys.T


def test_rlsedits_limits() -> None:
    moment, batches, ordinary = full_moment(), batches_of(3, 2), ordinary_keys()
    keys, values = joined(batches)
    assert 1e-14 < rlsedit(moment, lam=1e6).run(batches).norm() < 1e-9
    # A mapping held hard: an ordinary key's output stays, what ordinary keys do not span is free.
    hard = rlsedit(singular_moment(), lam=1e-2, mu=1e5)
    shift = hard.run(batches)
    assert (shift @ ordinary).norm() < 1e-7 * shift.norm() * ordinary.norm()
    assert close(hard.now @ keys, values, 1e-3)
    soft = rlsedit(moment, lam=1e-6, mu=1e-6)
    soft.run(batches)
    assert close(soft.now @ keys, values, 1e-8)


def test_rlsedit_needs_something_to_hold_on_to_and_a_hairs_breadth_is_enough() -> None:
    [(keys, values)], moment = batches_of(3), singular_moment()
    short = Stream(made("rlsedit", lam=0.0, mu=0.7, moment_weight=2.0), moment, hair=1e-3)
    haired = moment + 1e-3 * moment.diagonal().mean() * EYE
    short.edit(keys, values)
    assert close(short.now, rls_jointly([(keys, values)], short.base, haired, 0.0, 0.7, 2.0), 1e-10)
    # With neither anchor the released code would go on with a made-up matrix.
    loose = Stream(made("rlsedit", lam=0.0, mu=0.0, moment_weight=2.0), moment, hair=1e-3)
    with pytest.raises(NumericalError):
        loose.edit(keys, values)
    assert loose.tensors == {}


def test_an_edit_that_holds_already_is_learnt_without_a_change() -> None:
    stream, [first, (keys, _), third] = rlsedit(full_moment()), batches_of(2, 3, 1)
    other = rlsedit(full_moment())
    stream.edit(*first)
    other.edit(*first)
    assert torch.count_nonzero(stream.edit(keys, stream.now @ keys)) == 0
    assert not close(stream.tensors["inverse|0"], other.tensors["inverse|0"], 1e-2)
    # From now on it is protected: a later edit moves it less than it would have.
    assert (stream.edit(*third) @ keys).norm() < 0.9 * (other.edit(*third) @ keys).norm()


def test_an_edit_made_again_and_again_comes_ever_closer_and_never_goes_beyond() -> None:
    moment, [(key, value)] = full_moment(), batches_of(1)
    stream = rlsedit(moment, lam=3.0)
    gap = value - stream.now @ key
    s = float(key.T @ inv(information(moment, stream, [])) @ key)
    assert s < 2
    for count in range(1, 200):
        stream.edit(key, value)
        assert close(value - stream.now @ key, gap / (1 + count * s), 1e-9)
    assert (value - stream.now @ key).norm() < 0.05 * gap.norm()


@pytest.mark.parametrize("name", ["alphaedit", "rlsedit"])
def test_after_a_thousand_batches_the_recursion_is_still_the_direct_solution(name: str) -> None:
    moment, batches = full_moment(), batches_of(*[1 + index % 3 for index in range(1000)])
    stream = {"alphaedit": alphaedit(moment, threshold=1.0, ridge=0.01), "rlsedit": rlsedit(moment, lam=0.0)}[name]
    p = projector(moment, 1.0)
    for start in range(0, 1000, 100):
        stream.run(batches[start : start + 100])
        so_far = batches[: start + 100]
        keys, _ = joined(so_far)
        [carried] = stream.tensors.values()
        if name == "alphaedit":
            direct = stream.base + alphaedit_jointly(so_far, stream.base, p, 0.01)
            inverse = p @ inv(p @ keys @ keys.T @ p + 0.01 * EYE) @ p
        else:
            direct = rls_jointly(so_far, stream.base, moment, 0.0, 0.7, 2.0)
            inverse = inv(information(moment, stream, so_far))
        assert close(stream.now, direct, 1e-8)
        assert close(carried, inverse, 1e-8)
