"""A stream of edits in processes that are killed at random instants, and what must be true after each of them.

Run as a script: it imports everything and loads the model once, then forks the processes that edit. It prints what it
saw as JSON, and fails with a traceback where a promise was broken.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from everedit.edit import Edit
from everedit.ledger.blobs import Blobs
from everedit.ledger.store import Ledger
from everedit.living import LivingModel
from everedit.models import LanguageModel, load_model
from tests.support import tiny
from tests.support.living import fingerprint, make_living, stream

Say = Callable[..., None]


def forked(work: Callable[[Say], None]) -> tuple[int, int]:
    """Start a process that does ``work`` and says things on a pipe; return its id and the pipe's end."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(theirs)
        return child, ours
    code = 1
    try:
        os.close(ours)

        def say(kind: str, value: Any = "") -> None:
            os.write(theirs, (json.dumps([kind, value]) + "\n").encode())

        work(say)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Nothing of the parent's may run in the child: no fixtures, no exit handlers.
        os._exit(code)


def heard(pipe: int) -> list[list[Any]]:
    """Return all that was said on a pipe whose writer is gone."""
    said = b""
    while part := os.read(pipe, 1 << 16):
        said += part
    os.close(pipe)
    return [json.loads(line) for line in said.decode().split("\n") if line.endswith("]")]


def killed(work: Callable[[Say], None], delay: float, after: bytes = b"") -> tuple[bool, list[list[Any]]]:
    """Do ``work`` in a process and kill it after ``delay`` seconds, counted from when it says ``after`` if anything.

    Returns whether it was done before, and what it said.
    """
    child, pipe = forked(work)
    said = b""
    while after and after not in said and (part := os.read(pipe, 1 << 16)):
        said += part
    deadline = time.monotonic() + delay
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([pipe], [], [], left)
        if ready:
            part = os.read(pipe, 1 << 16)
            if not part:
                break
            said += part
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while part := os.read(pipe, 1 << 16):
        said += part
    os.close(pipe)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the process failed by itself"
    lines = [json.loads(line) for line in said.decode().split("\n") if line.endswith("]")]
    return not os.WIFSIGNALED(status), lines


def editing(folder: Path, lm: LanguageModel, edits: list[Edit]) -> Callable[[Say], None]:
    """Return the work of making those edits of a stream that are not made yet."""

    def work(say: Say) -> None:
        torch.set_num_threads(1)
        put = Blobs.put

        def told(self: Blobs, *args: Any) -> tuple[str, int]:
            say("writing", time.monotonic())
            return put(self, *args)

        Blobs.put = told  # type: ignore[method-assign]
        with LivingModel.open(folder, lm=lm) as living:
            say("open")
            held = {item.edit.id for item in living.ledger.held}
            for edit in edits:
                if edit.id not in held:
                    [_] = living.add([edit], again=True).commits
                    say("acknowledged", edit.id)
                    say("at", time.monotonic())
            say("end", fingerprint(living))

    return work


def require_prefix(folder: Path, edits: list[Edit], acknowledged: list[str]) -> int:
    """Assert that the ledger holds what was acknowledged, in order, and at most the edit that was being made."""
    ledger = Ledger.open(folder)
    held = [item.edit.id for item in ledger.held]
    ledger.close()
    assert held == [edit.id for edit in edits[: len(held)]]
    assert held[: len(acknowledged)] == acknowledged
    assert len(held) <= len(acknowledged) + 1
    return len(held)


def whole_stream(folder: Path, lm: LanguageModel, edits: list[Edit]) -> tuple[dict[str, str], float]:
    """Return what a stream that nobody kills comes to, and the seconds in which a commit of it is written."""
    child, pipe = forked(editing(folder, lm, edits))
    said = heard(pipe)
    assert os.waitpid(child, 0)[1] == 0
    began, times = 0.0, []
    for kind, value in said:
        # The first tensor is when a commit's writing begins.
        began = began or (value if kind == "writing" else 0.0)
        if kind == "at":
            times.append(value - began)
            began = 0.0
    return dict(said[-1][1]), median(times) if times else 0.0


def kill_a_stream(root: Path, corpus: Path, lm: LanguageModel, method: str, policy: str, edits: list[Edit], kills: int,
                  **options: Any) -> Counter[str]:  # fmt: skip
    """Kill a stream ``kills`` times, and compare its end with one never killed.

    Each second time inside a commit, else in turn within three edits of its being open, soon after it acknowledged an
    edit, and within three edits of the process's beginning. Which of these it was does not hang on the machine's speed.
    """
    draw, seen = random.Random(0), Counter[str]()
    for name in ("killed", "whole"):
        make_living(root / name, corpus, method, policy, lm=lm, **options).close()
    begun = time.monotonic()
    whole, a_commit = whole_stream(root / "whole", lm, edits)
    an_edit = (time.monotonic() - begun) / len(edits)
    acknowledged: list[str] = []
    finished = False
    while seen["kills"] < kills:
        inside = (b"writing", a_commit)
        turns = (inside, (b"open", 3 * an_edit), inside, (b"acknowledged", an_edit), inside, (b"", 3 * an_edit))
        after, most = turns[seen["kills"] % 6]
        finished, said = killed(editing(root / "killed", lm, edits), draw.uniform(0, most), after)
        acknowledged += [value for kind, value in said if kind == "acknowledged"]
        # What was written but not acknowledged counts from now on: it is there.
        held = require_prefix(root / "killed", edits, acknowledged)
        acknowledged = [edit.id for edit in edits[:held]]
        if finished:
            break
        seen["kills"] += 1
        seen["after writing began"] += bool(said) and said[-1][0] == "writing"
        seen["acknowledged by a killed process"] += any(kind == "acknowledged" for kind, _ in said)
    seen["left to do"] = len(edits) - len(acknowledged)
    assert whole_stream(root / "killed", lm, edits)[0] == whole
    with LivingModel.open(root / "killed", lm=lm) as living:
        assert fingerprint(living) == whole
        assert living.verify() == len(edits)
        assert [item.edit.id for item in living.ledger.held] == [edit.id for edit in edits]
    assert not list((root / "killed" / "blobs").glob("incoming-*"))
    return seen


def until_killed(work: Callable[[Say], None], kills: int, seed: int) -> Iterator[bool]:
    """Do ``work`` until it has been killed so many times, each time at another instant of the time that it takes from
    when it says that it has begun. Yields whether it was killed, the first time, when it is let be, included.
    """
    draw, takes, count = random.Random(seed), 0.0, 0
    for _ in range(10 * kills):
        finished, said = killed(work, draw.uniform(0, takes) if takes else 60, b"begun")
        if not takes:
            [takes] = [value for kind, value in said if kind == "took"]
        count += not finished
        yield not finished
        if count == kills:
            break


def timed(folder: Path, lm: LanguageModel, work: Callable[[LivingModel], object]) -> Callable[[Say], None]:
    """Return the work of opening a living model and doing something with it, which says how long that took."""

    def whole(say: Say) -> None:
        torch.set_num_threads(1)
        with LivingModel.open(folder, lm=lm) as living:
            say("begun")
            begun = time.monotonic()
            work(living)
            say("took", time.monotonic() - begun)

    return whole


def kill_exports(folder: Path, out: Path, lm: LanguageModel, kills: int) -> Counter[str]:
    """Kill exports: what stands in their place is whole, or is not there."""
    seen, files = Counter[str](), dict[str, int]()
    work = timed(folder, lm, lambda living: living.export("merged", out, measure=False))
    for was_killed in until_killed(work, kills, seed=1):
        seen["kills"] += was_killed
        if out.exists():
            found = {path.name: path.stat().st_size for path in out.iterdir()}
            files = files or found
            assert found == files
            shutil.rmtree(out)
    return seen


def kill_forgetting(folder: Path, lm: LanguageModel, edits: list[Edit], kills: int) -> Counter[str]:
    """Kill a forgetting that makes later edits again: it is done or it is not, and nothing of it is in between."""
    seen, ids = Counter[str](), [edit.id for edit in edits]
    with LivingModel.open(folder, lm=lm) as living:
        before, first = living.head, next(iter(living.ledger.held)).commit
    work = timed(folder, lm, lambda living: living.forget(first, how="replay"))
    for was_killed in until_killed(work, kills, seed=2):
        seen["kills"] += was_killed
        with LivingModel.open(folder, lm=lm) as living:
            held = [item.edit.id for item in living.ledger.held]
            assert held == (ids if living.head == before else ids[1:])
            if living.head != before:
                assert living.undo() == before
    return seen


def main(root: Path) -> None:
    torch.set_num_threads(1)
    corpus = root / "facts.txt"
    lm = load_model(tiny.trained("gpt2"), device="cpu", dtype="float32")
    found = {"ultraedit": kill_a_stream(root, corpus, lm, "ultraedit", "accumulate", stream(110), 100)}
    found["exports"] = kill_exports(root / "whole", root / "out", lm, 8)
    pair = root / "pair"
    pair.mkdir()
    options = {"policy_settings": {"lam": 1e-4, "start": "base"}}
    found["memit under simie"] = kill_a_stream(pair, corpus, lm, "memit", "simie", stream(20), 12, **options)
    short = root / "short"
    make_living(short, corpus, lm=lm).close()
    whole_stream(short, lm, stream(12))
    found["forgetting"] = kill_forgetting(short, lm, stream(12), 8)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
