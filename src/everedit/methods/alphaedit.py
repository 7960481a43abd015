"""AlphaEdit: Delta = R K^T P (C_p P + K K^T P + ridge I)^-1, with P the projector onto the null space of ordinary keys.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", ICLR 2025, equation 14
(there the ridge is 1; the released code has 10). P = U U^T spans the eigenvectors of the second moments C whose
eigenvalues are below a threshold, so that what ordinary text is mapped to stays; C_p sums k k^T over all earlier
edits, so that they stay too. In the basis U everything is symmetric and small: with A = U^T K the change is
R G^T U^T, G = M A (I + A^T M A)^-1, and M = (U^T C_p U + ridge I)^-1 is carried from edit to edit.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from everedit.engine.bench import Workbench
from everedit.engine.downdate import Forgotten
from everedit.engine.solve import recursive_step
from everedit.engine.state import Growing, State
from everedit.errors import NumericalError
from everedit.methods._base import Traits
from everedit.methods._spread import SpreadConfig, SpreadMethod, later_target, taken_out
from everedit.models.layout import Layout
from everedit.patch import LowRank, Patch


class AlphaEditConfig(SpreadConfig):
    """Settings of AlphaEdit; None means the published value for the family."""

    threshold: float | None = Field(
        None, ge=0, description="eigenvalues of the mean second moment below it span the null space; published: 0.02"
    )
    ridge: float | None = Field(None, gt=0, description="weight of ||Delta||^2, in units of a key's squared norm")
    keep_previous: bool = Field(True, description="protect the keys of earlier edits; False is SimIE's AlphaEdit-")

    def published_target(self, family: str) -> dict[str, float]:
        """Return the released settings."""
        return later_target(family)

    def own_choices(self, layout: Layout, *, searched: bool) -> dict[str, Any]:
        """Return the released threshold and ridge, or those searched for."""
        threshold, ridge = (_SEARCHED_THRESHOLD, _SEARCHED_RIDGE) if searched else (0.02, 10.0)
        return {
            "threshold": threshold if self.threshold is None else self.threshold,
            "ridge": ridge if self.ridge is None else self.ridge,
        }


# For SmolLM2-135M, on records that no table uses (docs/results/settings.md).
_SEARCHED_THRESHOLD, _SEARCHED_RIDGE = 0.02, 1.0


class AlphaEdit(SpreadMethod):
    """Writes only where ordinary text and earlier edits do not read."""

    name = "alphaedit"
    traits = Traits(
        title="AlphaEdit, editing in the null space of ordinary keys",
        paper="arXiv 2410.02355",
        solves_batches=True,
        keeps_state=True,
        solves_values=True,
    )
    Config = AlphaEditConfig
    config: AlphaEditConfig

    def projector(self, bench: Workbench, layer: int) -> Tensor:
        """Return P = U U^T (D, D), float64.

        Raises :class:`NumericalError` if the null space is empty.
        """
        assert self.config.threshold is not None
        values, vectors = bench.moments.get([layer])[layer].eigen
        # A second moment is not negative: what is, is rounding.
        basis = vectors[:, values.clamp_min(0) < self.config.threshold]
        if not basis.shape[1]:
            raise NumericalError(
                what=f"no direction of layer {layer} has a second moment below {self.config.threshold:g}, so there is "
                "nowhere to write",
                fix=f"raise the threshold; the smallest is {max(0.0, float(values.min())):.3g}",
            )
        return basis @ basis.T

    def solve(self, bench: Workbench, layer: int, keys: Tensor, residual: Tensor, tensors: Growing) -> LowRank:
        """Take one recursive step inside the null space, and carry the inverse with this batch's keys in it."""
        assert self.config.ridge is not None
        name = f"inverse|{layer}"
        inverse = tensors[name] if name in tensors else self.projector(bench, layer) / self.config.ridge
        gain, root = recursive_step(inverse.to(keys.device), keys)
        if self.config.keep_previous:
            # A layer's keys depend on the layers below it alone, which hold their changes already: these are the
            # keys of the edited model, as the paper wants them.
            tensors.setdefault(name, (inverse + inverse.T) / 2)
            tensors.grow(name, root, sign=-1, keys=keys)
        return LowRank(residual.double(), gain)

    def forget(self, bench: Workbench, forgotten: Forgotten, state: State) -> tuple[Patch, State] | None:
        """Leave the step out of the sums: with earlier keys kept, the stream is one least-squares problem inside the
        null space. The other steps' keys and values stay as found.
        """
        return taken_out(bench, self.layers(), forgotten, state) if self.config.keep_previous else None


METHOD = AlphaEdit
