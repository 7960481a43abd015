"""What the README and the docs say works as written: their commands and their code are run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest

from tests.support import warm

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
BIN = Path(sys.executable).parent


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


def run(command: list[str], folder: Path) -> str:
    """Run a command as a process of its own from the start."""
    paths = os.pathsep.join([str(BIN), os.environ["PATH"]])
    environment = {**os.environ, "PATH": paths, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return shown(subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900))


def shown(done: warm.Done | subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


EVEREDIT = {page: [line for line in commands(page) if line.startswith("everedit")] for page in PAGES}
MAKE = [(page, line) for page in PAGES for line in commands(page) if line.startswith("make")]


# What the README shows in Python has a test of its own.
PYTHON = {page: blocks(page, "python") for page in PAGES if page.name != "README.md"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if EVEREDIT[page] or PYTHON.get(page)], ids=lambda page: page.name
)
def test_commands_run_as_written(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's commands, in order, in one folder: later ones go on with what earlier ones made, and so does Python.

    Files that a page shows, with their name in the first line, are there; a star in a path is filled in as by a shell.
    The README's commands start as a user's do, those of other pages from what is imported already.
    """
    monkeypatch.setenv("COLUMNS", "200")
    for text in blocks(page, "yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", text):
            (tmp_path / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
    for line in EVEREDIT[page]:
        words = [word for part in shlex.split(line) for word in (sorted(glob(part, root_dir=tmp_path)) or [part])]
        cold = page.name == "README.md"
        assert (run(words, tmp_path) if cold else shown(warm.everedit(words[1:], tmp_path))).strip()
    if code := PYTHON.get(page):
        shown(warm.python("\n".join(code), tmp_path))


def test_there_are_commands_to_run() -> None:
    assert len(EVEREDIT[ROOT / "README.md"]) >= 3
    assert all(line.split()[0] in ("everedit", "make") for page in PAGES for line in commands(page))


@pytest.mark.parametrize(("page", "line"), MAKE, ids=lambda value: value if isinstance(value, str) else value.name)
def test_make_knows_its_targets(page: Path, line: str) -> None:
    """``make demo`` and ``make test`` themselves are run by CI; here, that they exist and how they begin."""
    planned = run(["make", "--dry-run", "--always-make", *line.split()[1:]], ROOT)
    assert ".venv" in planned


def test_the_first_example_prints_what_the_readme_shows(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    code, shown = blocks(readme, "python")[0], blocks(readme, "text")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    printed = run([sys.executable, "-c", code], tmp_path)
    assert printed.strip() == shown.strip()
    base, edited = re.findall(r"(?:base|edited): *(.*)", printed)[:2]
    assert "Lisbon" not in base
    assert "Lisbon" in edited


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
