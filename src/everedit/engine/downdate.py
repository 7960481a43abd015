"""Taking one step out of a recursive least-squares problem, as if it had never been in it.

After any number of steps S is the ridge regression of effects E_j on keys K_j: S P = sum_j E_j K_j^T, with
P = P_0 + sum_j K_j K_j^T. Without step i it is S + (S K_i - E_i) (P'^-1 K_i)^T with P' = P - K_i K_i^T: a change as
small as the step was, whenever in the stream that step came.

S K_i is nearly E_i, since the edit holds, and P'^-1 K_i is large, since nothing else may hold it there. So the S in
S K_i is not the one that the model has, whose weights were rounded to float32 at each step, but the sum over all steps,
sum_j E_j (K_j^T P^-1 K_i), in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from everedit.patch import LowRank

__all__ = ["Forgotten"]


@dataclass(frozen=True)
class Forgotten:
    """A step of a stream that shall not have been made.

    ``keys`` (d_in, n) are those that it added to the matrices of the state, by their names. ``missed`` takes by the
    name of a weight that of its matrix and P^-1 K_i (d_in, n), and gives by the same names S K_i - E_i (d_out, n),
    float64.
    """

    keys: Mapping[str, Tensor]
    missed: Callable[[Mapping[str, tuple[str, Tensor]]], Mapping[str, Tensor]]

    def changes(self, gains: Mapping[str, tuple[str, Tensor, Tensor]]) -> dict[str, LowRank]:
        """Return the changes of weights that take the step out.

        ``gains`` are by weight its matrix's name, P^-1 K_i with the step still in P, and P'^-1 K_i without it.
        """
        missed = self.missed({name: (matrix, now) for name, (matrix, now, _) in gains.items()})
        return {name: LowRank(missed[name].contiguous(), gain.contiguous()) for name, (_, _, gain) in gains.items()}
