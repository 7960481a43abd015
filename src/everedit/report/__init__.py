"""Turn a finished (or interrupted) run folder into one self-contained HTML page.

The report reads files only: it never loads a model and never imports the editing code, so a page can
be made on any machine that has the run folder and the ``report`` extra (jinja2, matplotlib).
"""

from everedit.report.run_report import write_report

__all__ = ["write_report"]
