"""Run a stream of edits: quarantine, baseline, edit, score, checkpoint, save; interrupted, it goes on from there."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from everedit._version import __version__
from everedit.cache import file_sha256
from everedit.data import Loaded, Rejected, load_edits
from everedit.edit import Edit
from everedit.editor import Commit, Editor
from everedit.engine.moments import Corpus
from everedit.errors import EditError, EvereditError
from everedit.evaluation import Baseline, EditScores, Evaluator
from everedit.evaluation.evaluate import average
from everedit.experiments.config import RunConfig
from everedit.experiments.folder import RunFolder
from everedit.experiments.summary import summarise
from everedit.models import LanguageModel, load_model

__all__ = ["Reporter", "make_editor", "resume", "start"]


class Reporter(Protocol):
    """Hears what a run is doing; the command line shows it, tests and notebooks need not."""

    def stage(self, text: str, total: int | None = None) -> None:
        """A new stage begins, of ``total`` steps if they are known."""

    def step(self, done: int, note: str = "") -> None:
        """The present stage has come to ``done``."""


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str, total: int | None = None) -> None:
        """Ignore it."""

    def step(self, done: int, note: str = "") -> None:
        """Ignore it."""


def start(config: RunConfig, out: Path, *, reporter: Reporter | None = None, command: str = "") -> dict[str, Any]:
    """Run ``config`` into the new folder ``out`` and return the summary.

    Raises :class:`EvereditError` before anything is computed if the config, the data or the folder will not do.
    """
    loaded = load_edits(config.data, config.data_path, keep_contradictions=config.contradictions == "keep")
    if not loaded.edits:
        raise EditError(
            what="the file holds no edit that can be used", where=str(loaded.path), fix="see everedit data validate"
        )
    folder = RunFolder.create(out)
    run = _Run(config, folder, reporter or Silent())
    run.load()
    run.choose(loaded)
    folder.write_json("config.json", run.describe(loaded, command))
    folder.write_rows("edits.jsonl", (edit.model_dump(mode="json", exclude_defaults=True) for edit in run.edits))
    return run.go()


def resume(out: Path, *, reporter: Reporter | None = None) -> dict[str, Any]:
    """Go on with the run in ``out`` where it was interrupted; finished edits are not repeated."""
    folder = RunFolder.open(out)
    described = folder.read_json("config.json")
    run = _Run(RunConfig.model_validate(described["run"]), folder, reporter or Silent())
    run.load()
    if run.lm.fingerprint != described["model"]["fingerprint"]:
        raise EvereditError(
            what="the model has changed since the run began", where=str(out), fix="start the run anew in another folder"
        )
    run.reopen()
    return run.go()


def make_editor(lm: LanguageModel, config: RunConfig) -> Editor:
    """Return the editor that a config describes."""
    stats = config.stats
    return Editor(
        lm,
        config.method,
        config.policy,
        method_settings=config.method_settings,
        policy_settings=config.policy_settings,
        corpus=Corpus(stats.corpus, stats.tokens, stats.window_tokens),
        seed=config.seed,
    )


@dataclass
class _Run:
    config: RunConfig
    folder: RunFolder
    reporter: Reporter
    edits: list[Edit] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def load(self) -> None:
        self.reporter.stage(f"loading {self.config.model}")
        self.lm = load_model(self.config.model, device=self.config.device, dtype=self.config.dtype)
        self.editor = make_editor(self.lm, self.config)
        self.evaluator = Evaluator(self.lm, self.config.protocols)
        self.editor.bench.moments.progress = lambda done, _: self.reporter.step(done)

    def choose(self, loaded: Loaded) -> None:
        """Take edits in order until there are enough, setting aside those that do not fit or change nothing."""
        self.rejected = list(loaded.rejected)
        queue = list(zip(loaded.edits, loaded.lines, strict=True))
        stored = Baseline.empty()
        self.reporter.stage("reading the unedited model's answers", self.config.edits)
        while queue and len(self.edits) < self.config.edits:
            need = min(32, self.config.edits - len(self.edits))
            batch, queue = queue[:need], queue[need:]
            fitting = [(edit, line) for edit, line in batch if self._fits(edit, line)]
            answers = self.evaluator.baseline([edit for edit, _ in fitting])
            stored = stored.joined(answers)
            for edit, line in fitting:
                if self.config.known == "quarantine" and answers.says_already(edit):
                    reason = "the target is already the model's answer"
                    self._reject(edit, line, reason, "there is nothing to edit; to keep such records: --set known=keep")
                else:
                    self.edits.append(edit)
            self.reporter.step(len(self.edits))
        if not self.edits:
            raise EditError(what="every record was set aside", where=str(loaded.path), fix="see everedit data validate")
        self.baseline = stored
        self.folder.write_json("base.json", stored.as_json())
        self.folder.write_rows("quarantine.jsonl", (item.as_dict() for item in self.rejected))

    def _fits(self, edit: Edit, line: int) -> bool:
        try:
            self.editor.check(edit)
            self.evaluator.check(edit)
        except EvereditError as error:
            self._reject(edit, line, error.what, error.fix)
            return False
        return True

    def _reject(self, edit: Edit, line: int, reason: str, fix: str) -> None:
        self.rejected.append(Rejected(line, reason, fix, edit.model_dump(mode="json", exclude_defaults=True)))

    def reopen(self) -> None:
        """Read back what an interrupted run left."""
        lines = (self.folder.path / "edits.jsonl").read_text(encoding="utf-8").split("\n")
        self.edits = [Edit.model_validate(json.loads(line)) for line in lines if line]
        self.baseline = Baseline.from_json(self.folder.read_json("base.json"))

    def go(self) -> dict[str, Any]:
        self.reporter.stage("second moments and contexts", self.config.stats.tokens)
        self.editor.prepare()
        state, done = self.folder.load_state(self.lm.device)
        self.editor.load_state(state)
        self.rows = [row for row in self.folder.rows() if row["n"] <= done]
        self.folder.write_rows("metrics.jsonl", self.rows)
        before = average_each(self.evaluator.score_baseline(self.edits, self.baseline))
        self.reporter.stage("editing", len(self.edits))
        self.reporter.step(done, self._running())
        last: list[EditScores] = []
        for n, commit in enumerate(self.editor.stream(self.edits[done:]), start=done + 1):
            with self.editor.bench.clock.phase("score"):
                immediate = self.evaluator.score([self.edits[n - 1]], self.baseline)[0]
            seconds = {**commit.seconds, **self.editor.bench.clock.take()}
            self._record(_edit_row(n, commit, before[n - 1], immediate.scores, seconds))
            if n in self._checkpoints():
                last = self._checkpoint(n)
            self.folder.save_state(self.editor.state(), n)
            self.reporter.step(n, self._running())
        return self._finish(last or self.evaluator.score(self.edits, self.baseline), before)

    def _checkpoints(self) -> set[int]:
        return {*self.config.checkpoints, len(self.edits)}

    def _checkpoint(self, n: int) -> list[EditScores]:
        scores = self.evaluator.score(self.edits[:n], self.baseline)
        self._record(
            {
                "kind": "checkpoint",
                "n": n,
                "retained": average(scores),
                "norm_ratio": self.editor.norm_ratios(),
                "peak_memory_mb": peak_memory_mb(),
            }
        )
        return scores

    def _record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.folder.append(row)

    def _running(self) -> str:
        done = [row["immediate"][self.config.protocols[0]]["reliability"] for row in self.rows if row["kind"] == "edit"]
        return f"reliability {sum(done) / len(done):.3f}" if done else ""

    def _finish(self, final: Sequence[EditScores], before: list[dict[str, Any]]) -> dict[str, Any]:
        n = len(self.edits)
        samples = [
            {"edit_id": edit.id, "n": n, **sample}
            for edit, scores in zip(self.edits, final, strict=True)
            for sample in scores.samples
        ]
        self.folder.write_rows("samples.jsonl", samples)
        rejected = (self.folder.path / "quarantine.jsonl").read_text(encoding="utf-8").count("\n")
        summary = summarise(self.rows, [item.scores for item in final], before, rejected, peak_memory_mb())
        self.folder.write_json("summary.json", summary)
        return summary

    def describe(self, loaded: Loaded, command: str) -> dict[str, Any]:
        """Return all that the run depends on, for ``config.json``."""
        method, policy = self.editor.method, self.editor.policy
        return {
            "model": {
                "name": self.config.model,
                "family": self.lm.layout.family.name,
                "parameters": self.lm.parameters,
                "fingerprint": self.lm.fingerprint,
                "dtype": str(self.lm.dtype).removeprefix("torch."),
                "device": str(self.lm.device),
            },
            "method": method.name,
            "policy": policy.name,
            "data": {"name": loaded.name, "path": str(loaded.path), "sha256": file_sha256(loaded.path)},
            "edits": len(self.edits),
            "checkpoints": list(self.config.checkpoints),
            "seed": self.config.seed,
            "settings": {
                "method": method.config.model_dump(mode="json"),
                "policy": policy.config.model_dump(mode="json"),
            },
            "statistics": self.editor.bench.moments.provenance["corpus"],
            "protocols": list(self.config.protocols),
            "versions": {
                "everedit": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "command": command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "run": self.config.model_dump(mode="json"),
        }


def average_each(scores: Sequence[EditScores]) -> list[dict[str, Any]]:
    """Return each edit's scores as plain values."""
    return [dict(item.scores) for item in scores]


def _edit_row(
    n: int, commit: Commit, before: dict[str, Any], immediate: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    edit = commit.edits[0]
    return {
        "kind": "edit",
        "n": n,
        "edit_id": edit.id,
        "prompt": edit.prompt,
        "subject": edit.subject,
        "target_new": edit.target_new,
        "ground_truth": edit.ground_truth,
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
        "update_norm": commit.norm,
        "target_probability": commit.target_probability,
        "memory_mb": resident_mb(),
        "before": before,
        "immediate": immediate,
    }


def resident_mb() -> float:
    """Return the memory that the process holds now, in MiB (its peak where the system does not say)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return peak_memory_mb()
    return pages * resource.getpagesize() / 2**20


def peak_memory_mb() -> float:
    """Return the most memory that the process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
