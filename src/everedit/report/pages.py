"""A page from its template, put in place at once, with errors that say what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from everedit.cache import atomic_write
from everedit.errors import CacheError, EvereditError, RunFolderError

__all__ = ["REPORT_NAME", "readable", "write_page"]

REPORT_NAME = "report.html"

# Control characters are invisible or illegal in HTML; their pictures are neither.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def readable(value: object) -> str:
    """Return a value as text that a page can show."""
    text = "" if value is None else str(value)
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def write_page(target: Path, template: str, values: Callable[[], dict[str, Any]]) -> Path:
    """Write what ``values()`` returns, in a template of this package, to ``target`` and return it.

    An earlier page is replaced only once the new one is complete.

    Raises:
        EvereditError: the ``report`` extra is not installed.
        RunFolderError: the page cannot be written.
    """
    page = _rendered(template, values)
    try:
        # A generated text may hold half a surrogate pair, which UTF-8 cannot express.
        atomic_write(target, lambda scratch: scratch.write_bytes(page.encode("utf-8", errors="replace")))
    except CacheError as error:
        raise RunFolderError(
            what=f"the report cannot be written ({error.what})",
            where=str(target),
            fix="check that the folder is writable and the disk has room",
        ) from error
    return target


def _rendered(template: str, values: Callable[[], dict[str, Any]]) -> str:
    try:
        import matplotlib  # noqa: F401 (only to learn early whether it is there)
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise EvereditError(
            what=f"the report needs a package that is not installed ({error.name})",
            where="everedit.report",
            fix="pip install 'everedit[report]'",
        ) from error
    environment = Environment(
        loader=PackageLoader("everedit.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values())
