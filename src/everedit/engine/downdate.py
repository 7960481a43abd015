"""Taking one step out of a recursive least-squares problem, as if it had never been in it.

After any number of steps S is the ridge regression of effects E_j on keys K_j: S P = sum_j E_j K_j^T, with
P = P_0 + sum_j K_j K_j^T. Without step i it is S + (S K_i - E_i) (P'^-1 K_i)^T with P' = P - K_i K_i^T: a change as
small as the step was, whenever in the stream that step came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from everedit.patch import LowRank, Patch

__all__ = ["Forgotten"]


@dataclass(frozen=True)
class Forgotten:
    """A step of a stream that shall not have been made.

    ``patch`` is the change that it made, with its effects as left factors, and ``keys`` are those (d_in, n) that a
    matrix of the state grew by, under that matrix's name. ``before(name, keys)`` gives what the stream's shift of a
    weight before the step made of keys, (d_out, n), and ``shift(name)`` is the shift now, (d_out, d_in), float64.
    """

    patch: Patch
    keys: Mapping[str, Tensor]
    before: Callable[[str, Tensor], Tensor]
    shift: Callable[[str], Tensor]

    def change(self, name: str, keys: Tensor, gain: Tensor) -> LowRank:
        """Return the change of a weight that takes the step out; ``gain`` is P'^-1 K (d_in, n), for the step's K."""
        delta = self.patch.deltas[name]
        assert isinstance(delta, LowRank)
        effect = delta.left.double().to(keys.device) + self.before(name, keys)
        return LowRank((self.shift(name) @ keys - effect).contiguous(), gain.contiguous())
