"""Processes forked from one that has imported everedit already: a command costs what it does, and not its imports."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

# What commands import when they need it.
_AHEAD = [
    "everedit.cli.main",
    "everedit.editor",
    "everedit.experiments",
    "everedit.experiments.sweeps",
    "everedit.living",
    "everedit.report",
    "sentence_transformers",
    "transformers.models.llama.modeling_llama",
]


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def everedit(words: Sequence[str], folder: Path) -> Done:
    """Run ``everedit WORDS…`` in a folder."""
    return _run(None, ["everedit", *words], folder)


def python(code: str, folder: Path) -> Done:
    """Run ``python FILE``, with this code in the file, in a folder."""
    file = folder / ".code.py"
    file.write_text(code, encoding="utf-8")
    return _run(file, [str(file)], folder)


def _run(file: Path | None, words: list[str], folder: Path, seconds: float = 900) -> Done:
    context = get_context("forkserver")
    context.set_forkserver_preload(_AHEAD)
    streams = [folder / f".{name}.txt" for name in ("stdout", "stderr")]
    child = context.Process(target=_become, args=(file, words, folder, dict(os.environ), streams))
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"{words} did not end in {seconds} seconds")
    return Done(child.exitcode, *(stream.read_text(encoding="utf-8") for stream in streams))


def _become(
    file: Path | None, words: list[str], folder: Path, environment: dict[str, str], streams: Sequence[Path]
) -> None:
    """Be the process that was asked for: its folder, environment, arguments and streams."""
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = words
    if file is None:
        runpy.run_module("everedit", run_name="__main__")
    else:
        runpy.run_path(str(file), run_name="__main__")
