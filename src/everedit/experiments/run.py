"""Run a stream of edits: quarantine, baseline, edit, score, checkpoint, save; interrupted, it goes on from there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everedit.data import Loaded, Rejected, data_set, load_edits
from everedit.edit import Edit
from everedit.editor import Commit, Editor, StreamState
from everedit.engine.moments import Corpus
from everedit.engine.state import State
from everedit.engine.weights import Snapshot
from everedit.errors import EditError, EvereditError, NumericalError, TokenError
from everedit.evaluation import FOR_ANY_DATA, PROTOCOLS, Baseline, EditScores
from everedit.evaluation.metrics import mean
from everedit.experiments.config import RunConfig
from everedit.experiments.folder import RunFolder
from everedit.experiments.kept_answers import KeptAnswers
from everedit.experiments.kept_values import KeptValues
from everedit.experiments.records import described, edit_row
from everedit.experiments.scoring import Scoring
from everedit.experiments.summary import summarise
from everedit.fitting import require_beneath
from everedit.models import LanguageModel, load_model
from everedit.models.memory import peak_memory_mb
from everedit.policies import make_policy
from everedit.report.sweep_files import ANSWERS, VALUES
from everedit.reporting import Reporter, Silent

__all__ = ["make_editor", "resume", "start"]


def start(
    config: RunConfig,
    out: Path,
    *,
    reporter: Reporter | None = None,
    command: str = "",
    shared: Path | None = None,
) -> dict[str, Any]:
    """Run ``config`` into the new folder ``out`` and return the summary.

    Runs that are given one ``shared`` folder ask the unedited model only once what they all ask of it, and find on it
    only once the values that they all want.
    Raises :class:`EvereditError` before anything is computed if the config, the data or the folder will not do.
    """
    loaded = load_edits(config.data, config.data_path, keep_contradictions=config.contradictions == "keep")
    data_set(loaded.name).require_protocols(loaded.name, config.protocols, FOR_ANY_DATA)
    if config.beneath:
        require_beneath(make_policy(config.policy, config.policy_settings))
    if not loaded.edits:
        raise EditError(
            what="the file holds no edit that can be used", where=str(loaded.path), fix="see everedit data validate"
        )
    folder = RunFolder.create(out)
    run = _Run(config, folder, reporter or Silent(), shared)
    run.load()
    run.choose(loaded)
    folder.write_json("config.json", described(config, run.editor, loaded, len(run.edits), command))
    run.save_choice()
    return run.go()


def resume(out: Path, *, reporter: Reporter | None = None, shared: Path | None = None) -> dict[str, Any]:
    """Go on with the run in ``out`` where it was interrupted; finished edits are not repeated."""
    folder = RunFolder.open(out)
    described = folder.read_json("config.json")
    run = _Run(RunConfig.model_validate(described["run"]), folder, reporter or Silent(), shared)
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
        corpus=Corpus(stats.corpus, stats.tokens, stats.window_tokens, imported=stats.imported),
        seed=config.seed,
    )


@dataclass
class _Run:
    config: RunConfig
    folder: RunFolder
    reporter: Reporter
    shared: Path | None
    edits: list[Edit] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    _final: list[EditScores] = field(default_factory=list)

    def load(self) -> None:
        self.reporter.stage(f"loading {self.config.model}")
        self.lm = load_model(self.config.model, device=self.config.device, dtype=self.config.dtype)
        self.editor = make_editor(self.lm, self.config)
        self.editor.require_batches(self.config.batch)
        if self.shared is not None:
            self.editor.find_targets = KeptValues(self.shared / VALUES, self.editor).find
        self.scoring = Scoring(self.config, self.editor)
        self.editor.bench.moments.progress = lambda done, _: self.reporter.step(done)

    def choose(self, loaded: Loaded) -> None:
        """Take edits in order until there are enough, setting aside those that do not fit or change nothing."""
        self.rejected = list(loaded.rejected)
        queue = list(zip(loaded.edits, loaded.lines, strict=True))
        if self.config.shuffle:
            random.Random(self.config.seed).shuffle(queue)
        kept = None if self.shared is None else self.shared / ANSWERS
        stored, unedited = Baseline.empty(), KeptAnswers(kept, self.scoring.evaluator, self.config)
        self.reporter.stage("reading the unedited model's answers", self.config.edits)
        while queue and len(self.edits) < self.config.edits:
            need = min(32, self.config.edits - len(self.edits))
            batch, queue = queue[:need], queue[need:]
            fitting = [(edit, line) for edit, line in batch if self._fits(edit, line)]
            answers = unedited.baseline([edit for edit, _ in fitting])
            stored = stored.joined(answers)
            for edit, line in fitting:
                if self.config.known == "quarantine" and answers.says_already(edit):
                    reason = "the target is already the model's answer"
                    self._reject(edit, line, reason, "there is nothing to edit; to keep such records: --set known=keep")
                else:
                    self.edits.append(edit)
                    self.lines.append(line)
            self.reporter.step(len(self.edits))
        if not self.edits:
            raise EditError(what="every record was set aside", where=str(loaded.path), fix="see everedit data validate")
        self.scoring.baseline = stored
        self.folder.write_json("base.json", stored.as_json())
        self.folder.write_rows("metrics.jsonl", ())

    def save_choice(self) -> None:
        """Write which records are edited, and which are not and why."""
        self.folder.write_rows("quarantine.jsonl", (item.as_dict() for item in self.rejected))
        chosen = zip(self.lines, self.edits, strict=True)
        rows = ({"line": line, **edit.model_dump(mode="json", exclude_defaults=True)} for line, edit in chosen)
        self.folder.write_rows("edits.jsonl", rows)

    def _fits(self, edit: Edit, line: int) -> bool:
        try:
            self.editor.check(edit)
            self.scoring.evaluator.check(edit)
        except EvereditError as error:
            self._reject(edit, line, error.what, error.fix)
            return False
        return True

    def _reject(self, edit: Edit, line: int, reason: str, fix: str) -> None:
        self.rejected.append(Rejected(line, reason, fix, edit.model_dump(mode="json", exclude_defaults=True)))

    def reopen(self) -> None:
        """Read back what an interrupted run left."""
        for row in self.folder.rows("edits.jsonl"):
            self.lines.append(row.pop("line"))
            self.edits.append(Edit.model_validate(row))
        self.rejected = [Rejected(**row) for row in self.folder.rows("quarantine.jsonl")]
        self.scoring.baseline = Baseline.from_json(self.folder.read_json("base.json"))

    def go(self) -> dict[str, Any]:
        self._measure_unedited()
        self.reporter.stage("second moments and contexts", self.config.stats.tokens)
        self.editor.prepare()
        # Spent once, before the first edit: none of it is an edit's.
        spent_before = self.editor.bench.clock.take()
        state, done = self.folder.load_state(self.lm.device)
        self.editor.load_state(state)
        self.rows = [row for row in self.folder.rows("metrics.jsonl") if row["n"] <= done]
        self.folder.write_rows("metrics.jsonl", self.rows)
        if self.config.single:
            self._final = self._made_singly(done)
        self.reporter.stage("editing", len(self.edits))
        self.reporter.step(done, self._running())
        for n, commit in self._stream(done):
            edits, first = commit.edits, n - len(commit.edits) + 1
            with self.editor.bench.clock.phase("score"):
                immediate, beneath = self.scoring.right_after(edits), self.scoring.right_after_beneath(edits)
            spent = {**commit.seconds, **self.editor.bench.clock.take()}
            seconds = {phase: value / len(edits) for phase, value in spent.items()}
            before = self.scoring.unedited(edits)
            for offset, (edit, old, new, more) in enumerate(zip(edits, before, immediate, beneath, strict=True)):
                self._record({**edit_row(first + offset, edit, commit, old.scores, new.scores, seconds), **more})
            if self.config.single:
                self._take_back(immediate)
            elif any(first <= mark <= n for mark in (*self.config.checkpoints, len(self.edits))):
                self.reporter.step(first - 1, "scoring all so far")
                self._checkpoint(n)
            self.folder.save_state(self.editor.state(), n)
            self.reporter.step(n, self._running())
        return self._finish(spent_before)

    def _stream(self, done: int) -> Iterator[tuple[int, Commit]]:
        """Make the edits behind the first ``done``; one that cannot be made is set aside and the stream goes on.

        A batch that fails is made edit by edit, to learn which of them it is.
        """
        singly = 0
        while done < len(self.edits):
            size = 1 if singly else min(self.config.batch, len(self.edits) - done)
            try:
                # The values that a stream finds ahead of time are the editor's, and are there for the next one.
                commit = next(self.editor.stream(self.edits[done:], size, apart=self.config.single))
            except (EditError, TokenError, NumericalError) as error:
                if size > 1:
                    singly = size
                    continue
                self._reject(self.edits.pop(done), self.lines.pop(done), error.what, error.fix)
                self.save_choice()
            else:
                done += size
                yield done, commit
            singly = max(0, singly - 1)

    def _made_singly(self, done: int) -> list[EditScores]:
        """Read back what the first ``done`` single edits scored, and forget what was written of a later one."""
        kept = [row for row in self.folder.rows("samples.jsonl") if row["n"] <= done] if done else []
        self.folder.write_rows("samples.jsonl", kept)
        samples: dict[int, list[dict[str, str]]] = {}
        for row in kept:
            samples.setdefault(row["n"], []).append({key: row[key] for key in row if key not in ("edit_id", "n")})
        edits = (row for row in self.rows if row["kind"] == "edit")
        return [EditScores(row["immediate"], samples.get(row["n"], [])) for row in edits]

    def _take_back(self, scores: list[EditScores]) -> None:
        """Go back to the unedited model; values that were found ahead of time stay."""
        for item in scores:
            self._final.append(item)
            for row in self._sample_rows(len(self._final), item):
                self.folder.append(row, "samples.jsonl")
        pending = self.editor.state().pending
        self.editor.load_state(StreamState(Snapshot({}), State(), State(), pending))

    def _sample_rows(self, n: int, scores: EditScores) -> Iterator[dict[str, Any]]:
        edit = self.edits[n - 1]
        yield from ({"edit_id": edit.id, "n": n, **sample} for sample in scores.samples)

    def _checkpoint(self, n: int) -> None:
        row, self._final, said = self.scoring.checkpoint(self.edits[:n], self._final if self.config.single else ())
        if said is not None:
            self.folder.write_json("answers.json", Baseline(said).as_json())
        self._record(row)

    def _measure_unedited(self) -> None:
        """Measure the general ability of the unedited model, unless that was done before an interruption."""
        if self.config.ability and not (self.folder.path / "ability.json").exists():
            self.reporter.stage("the unedited model's general ability")
            self.folder.write_json("ability.json", self.scoring.abilities())

    def _record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.folder.append(row)

    def _running(self) -> str:
        if not self.config.right_after:
            return ""
        name = self.config.right_after[0]
        metric = PROTOCOLS[name].metrics[0]
        done = mean(row["immediate"][name][metric] for row in self.rows if row["kind"] == "edit")
        return f"{metric} {done:.3f}" if done is not None else ""

    def _finish(self, spent_before: dict[str, float]) -> dict[str, Any]:
        n = len(self.edits)
        if not n:
            raise EditError(
                what="none of the edits could be made", where=str(self.folder.path), fix="see quarantine.jsonl"
            )
        if not any(row["kind"] == "checkpoint" and row["n"] == n for row in self.rows):
            # What was to be the last edit was set aside.
            self._checkpoint(n)
        final = self._final if len(self._final) == n else self.scoring.scores(self.edits)
        samples = (row for number, item in enumerate(final, start=1) for row in self._sample_rows(number, item))
        self.folder.write_rows("samples.jsonl", samples)
        before = [item.scores for item in self.scoring.unedited(self.edits)]
        scores = [item.scores for item in final]
        summary = summarise(self.rows, scores, before, len(self.rejected), peak_memory_mb())
        summary["seconds_before"] = spent_before
        summary["single"] = self.config.single
        if self.config.ability:
            marks = {str(row["n"]): row["ability"] for row in self.rows if row["kind"] == "checkpoint"}
            summary["ability"] = {"unedited": self.folder.read_json("ability.json"), "checkpoints": marks}
        # What methods and policies count as they go: layers chosen, edits not written.
        state = self.editor.state()
        summary["counts"] = {**state.method.values, **state.policy.values}
        self.folder.write_json("summary.json", summary)
        return summary
