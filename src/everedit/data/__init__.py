"""Data sets: one loader a file, all giving :class:`everedit.edit.Edit` records; what is wrong is set aside."""

from __future__ import annotations

from everedit.data.load import Loaded, Rejected, data_names, load_edits, review

__all__ = ["Loaded", "Rejected", "data_names", "load_edits", "review"]
