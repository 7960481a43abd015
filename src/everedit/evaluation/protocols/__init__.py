"""Named, versioned protocols: how what a model says becomes scores. Each family of papers has a file of its own.

Figures of two protocols never share a column: they are different measurements, even where they share a name.
"""

from __future__ import annotations

from everedit.evaluation.protocols import counterfact, general, knowedit, wild, wise, zsre
from everedit.evaluation.protocols._base import METRICS, Answers, Asks, Protocol, Scores

__all__ = ["FOR_ANY_DATA", "GENERAL", "METRICS", "PROTOCOLS", "Answers", "Asks", "Protocol", "Scores"]

GENERAL = tuple(protocol.name for protocol in general.PROTOCOLS)
"""The protocols for edits of any kind, which a run scores unless told otherwise."""

FOR_ANY_DATA = (*GENERAL, *(protocol.name for protocol in wild.PROTOCOLS))
"""The protocols that need nothing of a record but what every edit has."""

_MODULES = (general, counterfact, zsre, wise, knowedit, wild)
PROTOCOLS = {protocol.name: protocol for module in _MODULES for protocol in module.PROTOCOLS}
