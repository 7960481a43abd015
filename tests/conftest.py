"""What the tests share: one thread, and a cache and a corpus of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from everedit.cache import cache_root
from tests.support import facts


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the length of the session, which its worker processes share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def corpus_path(session_folder: Path) -> Path:
    """A text file with every fact of the table, a sentence a line; beside it the networks that tests train."""
    path = session_folder / "facts.txt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text("\n".join(facts.sentences()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def session_cache(session_folder: Path) -> Path:
    """A cache folder for the length of the session, so that each model's statistics are computed once.

    Only the packaged models stay where they are: converting them takes half a minute.
    """
    folder = session_folder / "cache"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            models = cache_root() / "models"
            models.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            (folder / "models").symlink_to(models)
    return folder


@pytest.fixture
def own_cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The session's cache, for the length of a test."""
    monkeypatch.setenv("EVEREDIT_CACHE", str(session_cache))
    return session_cache
