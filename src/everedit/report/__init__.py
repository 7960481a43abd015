"""Pages, tables, curves and comparisons from the folders of runs and sweeps, finished or interrupted.

All of it reads files only: no model is loaded and no editing code imported, so that a page can be made on any machine
that has the folders and the ``report`` extra (jinja2, matplotlib).
"""

from importlib.util import find_spec

from everedit.report.run_report import write_report
from everedit.report.sweep_report import is_sweep, write_sweep_report

__all__ = ["can_report", "is_sweep", "write_report", "write_sweep_report"]


def can_report() -> bool:
    """Whether the ``report`` extra is installed."""
    return all(find_spec(name) is not None for name in ("jinja2", "matplotlib"))
