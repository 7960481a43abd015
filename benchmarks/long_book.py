"""Ten thousand notes: the scores of a Marginalia run's edits when its book holds ever more notes of other edits.

    python -m benchmarks.long_book RUN --data DATA_FOLDER [--notes 1000 10000] [--out docs/results/long_book.md]

RUN is the folder of a finished run on counterfact/edit (python -m benchmarks.sweep_pages marginalia makes one in
.benchmarks/sweeps/marginalia/cells); the other edits are the records behind its own, of that file,
of counterfact/val and, for as many as are missing then, of counterfact/train. Of a note to which no prompt goes nothing
but its address can matter, so only those of the other notes are learned to which one of the prompts asked goes; that no
other one comes into play is checked at every pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from everedit.data import load_edits
from everedit.data.contradictions import contradicted_by
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.margin import Book, Margin
from everedit.engine.mentions import Mentions
from everedit.engine.router import Address
from everedit.engine.state import State
from everedit.evaluation import Baseline, Evaluator
from everedit.evaluation.evaluate import average
from everedit.experiments.config import RunConfig
from everedit.experiments.folder import RunFolder
from everedit.experiments.run import make_editor
from everedit.methods.marginalia import Marginalia
from everedit.models import LanguageModel, load_model
from everedit.models.calls import Call
from everedit.models.sentences import SentenceEncoder

FILES = ("edit.jsonl", "val.jsonl", "train.jsonl")
METRICS = ("reliability", "generalization", "locality")
AT_ONCE = 10


@dataclass
class Learned(Margin):
    """A book of which only the notes in ``known`` have their vector."""

    known: frozenset[int]

    def places(self, lm: LanguageModel, call: Call) -> Tensor:
        """As in any book; raises if a note is asked for that was not learned."""
        found = super().places(lm, call)
        if strange := set(found[:, 0].tolist()) - self.known - {-1}:
            raise RuntimeError(f"notes {sorted(strange)} were never learned")
        return found


@dataclass
class Measured:
    """What was found with a number of notes in the book."""

    notes: int
    means: dict[str, dict[str, float | None]]
    uncontradicted: dict[str, dict[str, float | None]]
    kept: int
    others: int
    named: int
    routed: int
    bytes_a_note: float


class LongBook:
    """A run's edits and their notes, with room for others behind them."""

    def __init__(self, run: Path, data: Path) -> None:
        folder = RunFolder.open(run)
        config = RunConfig.model_validate(folder.read_json("config.json")["run"])
        self.lm = load_model(config.model, dtype=config.dtype)
        self.editor: Editor = make_editor(self.lm, config)
        state, done = folder.load_state(self.lm.device)
        rows = folder.rows("edits.jsonl")[:done]
        self.edits = [Edit.model_validate({k: v for k, v in row.items() if k != "line"}) for row in rows]
        self.others = list(_others(data, {edit.prompt for edit in self.edits}))
        book = Book.of(state.method)
        assert book is not None
        assert len(book.notes) == len(self.edits)
        self.book = book
        self.evaluator = Evaluator(self.lm, config.protocols)
        self.baseline = Baseline.from_json(folder.read_json("base.json"))
        assert isinstance(self.editor.method, Marginalia)
        self.encoder = SentenceEncoder(self.editor.method.config.encoder)
        self.found: dict[int, Tensor] = {}
        self.editor.prepare()

    def measured(self, notes: int) -> Measured:
        """Return the run's edits' scores with as many notes in the book."""
        mine = len(self.edits)
        extra = self.others[: notes - mine]
        addresses = [Address.of(edit) for edit in extra]
        keys = self.encoder.embed([address.key() for address in addresses])
        empty = torch.full((len(extra), self.book.notes.shape[1]), torch.nan)
        book = self.book.joined(Book.written(empty, keys.cpu(), addresses)) if extra else self.book
        margin = self._margin(book)
        prompts = list(dict.fromkeys(prompt for edit in self.edits for prompt, _ in self.evaluator.probes(edit)))
        routes = dict(zip(prompts, margin.router.routes(prompts), strict=True))
        wanted = sorted({route.note for route in routes.values() if route.note >= mine})
        subjects = Mentions((edit.subject, note) for note, edit in enumerate([*self.edits, *extra]) if edit.subject)
        asked = [probe.prompt for edit in self.edits for probe in edit.locality]
        named, routed = sum(bool(subjects.find(prompt)) for prompt in asked), sum(routes[p].note >= 0 for p in asked)
        self._learn([note for note in wanted if note not in self.found])
        vectors = book.notes.clone()
        for note in wanted:
            vectors[note] = self.found[note]
        book = replace(book, notes=vectors)
        full = self._margin(book)
        known = frozenset((*range(mine), *wanted))
        with Learned(full.layer, book, full.router, full.onward, known).attached(self.lm):
            scores = self.evaluator.score(self.edits, self.baseline)
        later = contradicted_by([*self.edits, *extra])[:mine]
        kept = [score for score, place in zip(scores, later, strict=True) if place is None]
        size = sum(tensor.numel() * tensor.element_size() for tensor in book.state().tensors.values()) / notes
        return Measured(notes, average(scores), average(kept), len(kept), len(wanted), named, routed, size)

    def _margin(self, book: Book) -> Margin:
        margin = self.editor.method.memory(self.editor.bench, book.state())
        assert isinstance(margin, Margin)
        return margin

    def _learn(self, notes: Sequence[int]) -> None:
        for begin in range(0, len(notes), AT_ONCE):
            part = notes[begin : begin + AT_ONCE]
            edits = [self.others[note - len(self.edits)] for note in part]
            patch, _ = self.editor.method.fit(self.editor.bench, edits, State())
            self.found |= dict(zip(part, patch.memory[self.editor.method.name], strict=True))


def _others(data: Path, taken: set[str]) -> Iterable[Edit]:
    for file in FILES:
        for edit in load_edits("counterfact", data / "counterfact" / file, keep_contradictions=True).edits:
            if edit.prompt not in taken:
                taken.add(edit.prompt)
                yield edit


def page(found: Sequence[Measured], edits: int) -> str:
    """Return the page."""
    lines = [
        "# Ten thousand notes",
        "",
        "    python -m benchmarks.long_book RUN --data DATA_FOLDER --out docs/results/long_book.md",
        "",
        f"Marginalia's book of the first {edits:,} edits of CounterFact ([marginalia.md](marginalia.md)), with the",
        "notes of other edits written behind them, and the scores of those first edits then. Of the others only those",
        "notes are learned to which one of the prompts goes: of one that no prompt goes to the address is all that",
        "counts. Edits that a later one contradicts are left out of the second group. RUN is that page's run.",
    ]
    for heading, part in (("all", "means"), ("not contradicted later", "uncontradicted")):
        for protocol in found[0].means:
            names = " | ".join(METRICS)
            lines += ["", f"| {protocol}, {heading}: notes | edits | {names} |", "|---:|---:|" + "---:|" * len(METRICS)]
            for one in found:
                scores = getattr(one, part)[protocol]
                count = edits if part == "means" else one.kept
                lines.append(f"| {one.notes:,} | {count} | {' | '.join(f'{scores[name]:.3f}' for name in METRICS)} |")
    lines += ["", "| notes | other edits' notes that a prompt goes to | locality prompts that name a note's subject | "]
    lines[-1] += "locality prompts that go to a note | bytes a note |"
    lines.append("|---:|---:|---:|---:|---:|")
    for one in found:
        lines.append(f"| {one.notes:,} | {one.others} | {one.named} | {one.routed} | {one.bytes_a_note:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--notes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--out", type=Path, default=Path("docs/results/long_book.md"))
    options = parser.parse_args()
    book = LongBook(options.run, options.data)
    found = []
    for notes in options.notes:
        found.append(book.measured(notes))
        options.out.write_text(page(found, len(book.edits)), encoding="utf-8")


if __name__ == "__main__":
    main()
