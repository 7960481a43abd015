"""Data sets: one loader a file, all giving :class:`everedit.edit.Edit` records; what is wrong is set aside."""

from __future__ import annotations

from everedit.data.dataset import DataSet, data_names, data_set
from everedit.data.load import Loaded, Notice, Rejected, load_edits, review

__all__ = ["DataSet", "Loaded", "Notice", "Rejected", "data_names", "data_set", "load_edits", "review"]
