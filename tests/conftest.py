"""What the tests share: one thread, and a cache and a corpus of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import facts


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with every fact of the table, a sentence a line."""
    path = tmp_path_factory.mktemp("corpus") / "facts.txt"
    path.write_text("\n".join(facts.sentences()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(_session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for the length of the session, so that each model's statistics are computed once."""
    monkeypatch.setenv("EVEREDIT_CACHE", str(_session_cache))
    return _session_cache
