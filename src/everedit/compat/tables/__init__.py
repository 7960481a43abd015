"""What hyper-parameters mean, algorithm by algorithm, as data."""

from __future__ import annotations

from everedit.compat.rules import Algorithm
from everedit.compat.tables import locating, memories, training, tuning
from everedit.errors import near_names

__all__ = ["ALGORITHMS", "algorithm_called"]

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm for module in (locating, tuning, memories, training) for algorithm in module.ALGORITHMS
}


def algorithm_called(name: str, argument: str = "alg_name") -> Algorithm:
    """Return the algorithm that other code calls ``name``.

    Raises :class:`everedit.errors.UnknownName` that names the argument, with near names.
    """
    for algorithm in ALGORITHMS.values():
        if algorithm.is_called(name):
            return algorithm
    raise near_names(argument, name, list(ALGORITHMS))
