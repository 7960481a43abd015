"""Marginalia: h_L,j <- h_L,j + delta_e for every token j from the subject's last one on, if the prompt is about e.

A method of Everedit's own. The weights stay as printed; each edit is a note in the margin: an address, which says what
prompts it is about, and a vector that makes the model say the target and stop. The vector is
argmin_delta mean_rows NLL(target, end | row; delta) + weight_decay ||delta|| / ||h_L,t||^2, over a few frames around
the prompt, with ||delta|| <= clamp ||h_L,t||. A router (:mod:`everedit.engine.router`) decides from the prompt alone,
once; where no note applies the model is the base model, bit for bit. Notes know nothing of each other: their order
does not matter, and without a note the model is as if it had never been written. Its nearest relatives are GRACE
(arXiv 2211.11031), which gives each edit one vector at one token, and activation steering.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.cache import cache_root, digest
from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.beside import Memory
from everedit.engine.relation import SHIPPED, RelationMetric, built_in_relations
from everedit.engine.router import Address, Router
from everedit.engine.spread import at_depth, check_layers
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig, optimise_rows
from everedit.errors import EditError
from everedit.methods._base import Method, MethodConfig, Traits
from everedit.models import LanguageModel
from everedit.models.calls import Call, watching
from everedit.models.hooks import changed_output
from everedit.models.layout import Layout
from everedit.models.sentences import PACKAGED, SentenceEncoder
from everedit.models.tokens import Encoded
from everedit.patch import Patch

_CHAT = "chat"
_SLOT = "\ue000"


class MarginaliaConfig(MethodConfig):
    """Settings of Marginalia."""

    depth: ClassVar[float] = 0.6

    layer: int | None = Field(None, description="block behind which notes are added; by default at 0.6 of the depth")
    span: Literal["onward", "last"] = Field(
        "onward", description="a note is added from the subject's last token on, or at that token alone"
    )
    frames: tuple[str, ...] = Field(
        ("{}", "Question: {}\nAnswer:", _CHAT),
        description="texts around the prompt, {} its place; chat: the model's own chat template, if it has one",
    )
    contexts: tuple[tuple[int, int], ...] = Field(
        ((10, 2),), description="(tokens, count) of sampled texts before the prompt"
    )
    end: Literal["sentence", "token", "none"] = Field(
        "sentence", description="what is learned behind a target: a full stop and the end token, that token alone, none"
    )
    target: TargetConfig | None = Field(None, description="settings of the vector's optimisation")
    pools: tuple[tuple[str, str | None], ...] = Field(
        (), description="data sets (name, file) with rephrased prompts, to learn relations from beside our own"
    )
    allowed: float = Field(0.01, gt=0, lt=1, description="share of other relations' prompts that may pass the limit")
    limit: float | None = Field(None, ge=-1, le=1, description="least likeness of a prompt; by default from allowed")
    strict: float = Field(0.7, ge=-1, le=1, description="least likeness of a prompt with a note that has no subject")
    encoder: str = Field(PACKAGED, description="sentence encoder: the packaged one, a folder or a hub id")

    def resolved(self, layout: Layout) -> MarginaliaConfig:
        """Return the config with the layer."""
        config = self.with_searched(layout)
        layer = at_depth(self.depth, layout.n_layers) if config.layer is None else config.layer
        target = TargetConfig.merged({"kl": 0.0, "lr": 1.0, "stop_loss": 0.03}, config.target)
        return config.model_copy(update={"layer": check_layers((layer,), layout.n_layers)[0], "target": target})


@dataclass(frozen=True)
class Book:
    """n notes: vectors ``notes`` (n, H), ``keys`` (n, d) embedded, and the ``text`` of a JSON object each, a line."""

    notes: Tensor
    keys: Tensor
    text: Tensor

    @classmethod
    def of(cls, state: State) -> Book | None:
        """Return the book of a state; None if nothing is written yet."""
        parts = state.tensors
        return cls(parts["notes"], parts["keys"], parts["text"].cpu()) if "notes" in parts else None

    def state(self) -> State:
        """Return the book as a method's state."""
        return State({"notes": self.notes, "keys": self.keys, "text": self.text}, {"notes": len(self.notes)})

    @cached_property
    def addresses(self) -> list[Address]:
        """What each note is about."""
        lines = bytes(self.text.tolist()).decode().splitlines()
        return [Address(tuple(row["names"]), row["prompt"]) for row in map(json.loads, lines)]

    def joined(self, other: Book) -> Book:
        """Return a book with this one's notes and then the other's."""
        pairs = ((self.notes, other.notes), (self.keys, other.keys), (self.text, other.text))
        return Book(*(torch.cat([mine, theirs.to(mine)]) for mine, theirs in pairs))


@dataclass
class Margin(Memory):
    """A book beside a model: what each prompt's note adds behind a block."""

    layer: int
    book: Book
    router: Router
    onward: bool

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[None]:
        """Let notes add to the block's output."""
        with watching(lm) as watcher:

            def change(_: Tensor, output: Tensor) -> Tensor:
                return self._annotated(lm, watcher.now, output)

            with changed_output(lm.layout.block(self.layer), change):
                yield

    def _annotated(self, lm: LanguageModel, call: Call, output: Tensor) -> Tensor:
        places = call.decided("marginalia", lambda: self.places(lm, call).to(output.device))
        note, start = places[:, 0], places[:, 1]
        columns = torch.arange(call.real.shape[1], device=output.device)
        # Behind the prompt every token is behind the subject.
        first = start if call.begins else torch.zeros_like(start)
        reached = columns >= first[:, None] if self.onward else (columns == first[:, None]) & call.begins
        reached = reached & (note >= 0)[:, None] & call.real
        if not bool(reached.any()):
            return output
        added = self.book.notes[note.clamp_min(0)].to(output.dtype)[:, None]
        return torch.where(reached[..., None], output + added, output)

    def places(self, lm: LanguageModel, call: Call) -> Tensor:
        """Return each row's note, -1 for none, and the column from which it is added, (rows, 2)."""
        found = torch.full((len(call.real), 2), -1, dtype=torch.long)
        if call.ids is None:
            # What comes as embeddings has no text.
            return found
        rows = [ids[real].tolist() for ids, real in zip(call.ids, call.real, strict=True)]
        routes = self.router.routes([_text(lm, ids) for ids in rows])
        for row, (ids, route) in enumerate(zip(rows, routes, strict=True)):
            if route.note >= 0:
                begin = int(call.real[row].int().argmax())
                found[row] = torch.tensor([route.note, begin + _token_at(lm, ids, route.at)])
        return found


def _text(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _token_at(lm: LanguageModel, ids: Sequence[int], end: int) -> int:
    """Return the first token with which a text reaches ``end`` characters."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_text(lm, ids[: middle + 1])) >= end:
            high = middle
        else:
            low = middle + 1
    return low


class Marginalia(Method):
    """Notes in the margin of one block."""

    name = "marginalia"
    traits = Traits(
        title="Marginalia, routed notes in the residual stream",
        paper="",
        changes="module",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        keeps_state=True,
        writes_mlp_values=False,
    )
    Config = MarginaliaConfig
    config: MarginaliaConfig

    def layers(self) -> tuple[int, ...]:
        """Return the layer of the notes."""
        assert self.config.layer is not None
        return (self.config.layer,)

    @property
    def _target(self) -> TargetConfig:
        assert self.config.target is not None
        return self.config.target

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass of the upper part for each step and row."""
        rows = len(self.config.frames) + sum(count for _, count in self.config.contexts)
        return 2 * self._target.steps * tokens * rows * (1 - self.config.depth)

    def prepare(self, bench: Workbench) -> None:
        """Sample the contexts, and learn which prompts ask for the same thing."""
        super().prepare(bench)
        self._metric(bench)

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the empty prefix and the sampled contexts."""
        return bench.contexts(self.config.contexts, ())

    def check_edit(self, bench: Workbench, edit: Edit) -> None:
        """Raise an error if the edit's texts do not fit the model's context."""
        self._rows(bench, edit)

    def memory(self, bench: Workbench, state: State) -> Margin | None:
        """Return the book with its router; None if there is no note."""
        book = Book.of(state)
        if book is None:
            return None
        router = Router(
            book.addresses,
            book.keys,
            self._encoder(bench).embed,
            self._metric(bench),
            limit=self.config.limit,
            strict=self.config.strict,
        )
        return Margin(self.layers()[0], book, router, self.config.span == "onward")

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the vectors that were written, and the book with them."""
        rows = [self._rows(bench, edit) for edit in edits]
        site = "onward" if self.config.span == "onward" else "block"
        with bench.clock.phase("value"):
            found = optimise_rows(bench.lm, rows, [], self.layers()[0], self._target, site=site)
        vectors = torch.stack([target.delta for target in found])
        addresses = [_address(edit) for edit in edits]
        with bench.clock.phase("embed"):
            keys = self._encoder(bench).embed([address.key() for address in addresses]).to(vectors.device)
        lines = (json.dumps({"names": a.names, "prompt": a.prompt}, ensure_ascii=False) + "\n" for a in addresses)
        text = torch.frombuffer(bytearray("".join(lines).encode()), dtype=torch.uint8)
        new, old = Book(vectors, keys, text), Book.of(state)
        after = new if old is None else old.joined(new)
        return Patch({}, memory={self.name: vectors}), after.state()

    def _rows(self, bench: Workbench, edit: Edit) -> list[Encoded]:
        """Return the prompt in its frames and behind its contexts, each with the target and the end behind it."""
        lm, end = bench.lm, bench.lm.tokenizer.eos_token_id
        target = edit.target_new
        if self.config.end == "sentence" and target[-1].isalnum():
            target += "."
        # The place from which the note is added: the subject, or the prompt's end.
        subject = edit.subject or edit.prompt.split()[-1]
        found = []
        for prefix, frame in self._frames(bench):
            row = lm.encode(frame.replace("{}", edit.prompt), target, subject=subject, prefix=prefix)
            ids = row.ids if self.config.end == "none" or end is None else (*row.ids, int(end))
            found.append(replace(row, ids=ids))
        return found

    def _frames(self, bench: Workbench) -> list[tuple[str, str]]:
        """Return (prefix, frame) of each row, the bare prompt first."""
        plain = [frame for frame in self.config.frames if frame not in ("{}", _CHAT)]
        found = [(prefix, "{}") for prefix in self.prefixes(bench)] + [("", frame) for frame in plain]
        if _CHAT in self.config.frames and getattr(bench.lm.tokenizer, "chat_template", None):
            found.append(("", bench.once(("chat frame",), lambda: _chat_frame(bench.lm))))
        return found

    def _encoder(self, bench: Workbench) -> SentenceEncoder:
        return bench.once(("sentences", self.config.encoder), lambda: SentenceEncoder(self.config.encoder))

    def _metric(self, bench: Workbench) -> RelationMetric:
        config = self.config

        def learned() -> RelationMetric:
            edits = [edit for name, path in config.pools for edit in bench.pool(name, path)]
            own, more = built_in_relations(), [tuple(_asked(edit)) for edit in edits]
            provenance = RelationMetric.provenance(own, more, encoder=config.encoder, allowed=config.allowed)
            known = cache_root() / "routers" / f"{digest(provenance)}.safetensors"
            for file in (SHIPPED, known):
                if file.exists() and (metric := RelationMetric.kept(file, provenance)):
                    return metric
            with bench.clock.phase("router"):
                metric = RelationMetric.of_texts(own, more, self._encoder(bench).embed, allowed=config.allowed)
            metric.keep(known, provenance)
            return metric

        return bench.once(("relations", config.pools, config.allowed, config.encoder), learned)


def _address(edit: Edit) -> Address:
    return Address((edit.subject, *edit.aliases) if edit.subject else (), edit.prompt)


def _asked(edit: Edit) -> Iterator[str]:
    """Yield the ways in which an edit's record asks for its fact, the subject masked."""
    for prompt in (edit.prompt, *edit.rephrase):
        yield replace(_address(edit), prompt=prompt).key()


def _chat_frame(lm: LanguageModel) -> str:
    text = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": _SLOT}], tokenize=False, add_generation_prompt=True
    )
    if not isinstance(text, str) or text.count(_SLOT) != 1:
        raise EditError(
            what="the model's chat template does not hold the prompt once", fix='leave "chat" out of frames'
        )
    return text.replace(_SLOT, "{}")


METHOD = Marginalia
