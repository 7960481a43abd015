"""Marginalia: h_L,j <- h_L,j + delta_e for every token j from the subject's last one on, if the prompt is about e.

A method of Everedit's own. The weights stay as printed; each edit is a note in the margin: an address, which says what
prompts it is about, and a vector that makes the model say the target and stop. The vector is
argmin_delta mean_rows NLL(target, end | row; delta) + weight_decay ||delta|| / ||h_L,t||^2, over the prompt in a few
frames and over other ways to ask for the same, with ||delta|| <= clamp ||h_L,t||. A router
(:mod:`everedit.engine.router`) decides from the prompt alone, once; where no note applies the model is the base model,
bit for bit. Notes know nothing of each other: their order does not matter, and without a note the model is as if it
had never been written. Its nearest relatives are GRACE (arXiv 2211.11031), which gives each edit one vector at one
token, and activation steering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.margin import Book, Margin
from everedit.engine.relation import RelationMetric, built_in_wordings
from everedit.engine.router import Address, Router
from everedit.engine.spread import at_depth, check_layers
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig, optimise_rows
from everedit.engine.wordings import Wordings
from everedit.errors import EditError
from everedit.methods._base import Method, MethodConfig, Traits
from everedit.models import LanguageModel
from everedit.models.layout import Layout
from everedit.models.sentences import PACKAGED, SentenceEncoder
from everedit.models.tokens import Encoded
from everedit.patch import Patch

_CHAT = "chat"
_SLOT = "\ue000"
_STAND_IN = 10


class MarginaliaConfig(MethodConfig):
    """Settings of Marginalia."""

    depth: ClassVar[float] = 0.6

    layer: int | None = Field(None, description="block behind which notes are added; by default at 0.6 of the depth")
    span: Literal["onward", "last"] = Field(
        "onward", description="a note is added from the subject's last token on, or at that token alone"
    )
    frames: tuple[str, ...] = Field(
        ("{}", _CHAT),
        description="texts around the prompt, {} its place; chat: the model's own chat template, if it has one",
    )
    wordings: int = Field(
        5,
        ge=0,
        description="other ways to ask for the same, of the relations known, that a note is learned from; for a prompt "
        "without a subject, as many sampled texts before it",
    )
    contexts: tuple[tuple[int, int], ...] = Field((), description="(tokens, count) of sampled texts before the prompt")
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
        target = TargetConfig.merged({"kl": 0.0, "descent": "strides", "stop_loss": 0.05}, config.target)
        return config.model_copy(update={"layer": check_layers((layer,), layout.n_layers)[0], "target": target})


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
        rows = len(self.config.frames) + self.config.wordings + sum(count for _, count in self.config.contexts)
        return 2 * self._target.steps * tokens * rows * (1 - self.config.depth)

    def prepare(self, bench: Workbench) -> None:
        """Sample the contexts, and learn which prompts ask for the same thing."""
        super().prepare(bench)
        self._stand_ins(bench)
        self._metric(bench)

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the empty prefix and the sampled contexts."""
        return bench.contexts(self.config.contexts, ())

    def check_edit(self, bench: Workbench, edit: Edit) -> None:
        """Raise an error if the edit's prompt, in its frames and with its target, does not fit the model's context."""
        self._rows(bench, edit, self._framed(bench, edit))

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
        addresses = [Address.of(edit) for edit in edits]
        with bench.clock.phase("embed"):
            keys = self._encoder(bench).embed([address.key() for address in addresses])
            others = self._others(bench, addresses, keys)
        rows = [
            self._rows(bench, edit, self._framed(bench, edit) + own) for edit, own in zip(edits, others, strict=True)
        ]
        site = "onward" if self.config.span == "onward" else "block"
        with bench.clock.phase("value"):
            found = optimise_rows(bench.lm, rows, [], self.layers()[0], self._target, site=site)
        vectors = torch.stack([target.delta for target in found])
        keys = keys.to(vectors.device)
        new, old = Book.written(vectors, keys, addresses), Book.of(state)
        after = new if old is None else old.joined(new)
        return Patch({}, memory={self.name: vectors}), after.state()

    def _rows(self, bench: Workbench, edit: Edit, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Return prompts behind their prefixes, each with the target and the end behind it."""
        lm, end = bench.lm, bench.lm.tokenizer.eos_token_id
        target = edit.target_new
        if self.config.end == "sentence" and target[-1].isalnum():
            target += "."
        # The place from which the note is added: the subject, or the prompt's end.
        subject = edit.subject or edit.prompt.split()[-1]
        found = []
        for prefix, text in texts:
            row = lm.encode(text, target, subject=subject, prefix=prefix)
            ids = row.ids if self.config.end == "none" or end is None else (*row.ids, int(end))
            found.append(replace(row, ids=ids))
        return found

    def _framed(self, bench: Workbench, edit: Edit) -> list[tuple[str, str]]:
        """Return (prefix, text) of the prompt behind its contexts and in its frames, the bare prompt first."""
        plain = [frame for frame in self.config.frames if frame not in ("{}", _CHAT)]
        found = [(prefix, "{}") for prefix in self.prefixes(bench)] + [("", frame) for frame in plain]
        if _CHAT in self.config.frames and getattr(bench.lm.tokenizer, "chat_template", None):
            found.append(("", bench.once(("chat frame",), lambda: _chat_frame(bench.lm))))
        return [(prefix, frame.replace("{}", edit.prompt)) for prefix, frame in found]

    def _others(self, bench: Workbench, addresses: Sequence[Address], keys: Tensor) -> list[list[tuple[str, str]]]:
        """Return (prefix, text) of the other ways to ask for what each address, embedded in ``keys``, asks for."""
        count = self.config.wordings
        if not count:
            return [[] for _ in addresses]
        found = []
        for address, key in zip(addresses, self._metric(bench).project(keys), strict=True):
            if address.names:
                texts = self._wordings(bench).near(key, count, address.wording())
                found.append([("", text.replace("{}", address.names[0])) for text in texts])
            else:
                found.append([(prefix, address.prompt) for prefix in self._stand_ins(bench)])
        return found

    def _stand_ins(self, bench: Workbench) -> list[str]:
        """Return sampled texts (tokens: ``_STAND_IN``) to stand before prompts that cannot be put in other words."""
        return bench.contexts(((_STAND_IN, self.config.wordings),), ())[1:] if self.config.wordings else []

    def _encoder(self, bench: Workbench) -> SentenceEncoder:
        return bench.once(("sentences", self.config.encoder), lambda: SentenceEncoder(self.config.encoder))

    def _metric(self, bench: Workbench) -> RelationMetric:
        def learned() -> RelationMetric:
            asked = [tuple(address.key() for address in _asked(edit)) for edit in self._pooled(bench)]
            with bench.clock.phase("router"):
                return RelationMetric.known(asked, self._encoder(bench), self.config.allowed)

        return bench.once(("relations", self.config.pools, self.config.allowed, self.config.encoder), learned)

    def _wordings(self, bench: Workbench) -> Wordings:
        def gathered() -> Wordings:
            asked = (address.wording() for edit in self._pooled(bench) for address in _asked(edit))
            return Wordings([*built_in_wordings(), *asked], self._metric(bench).keys)

        return bench.once(("wordings", self.config.pools, self.config.allowed, self.config.encoder), gathered)

    def _pooled(self, bench: Workbench) -> list[Edit]:
        return [edit for name, path in self.config.pools for edit in bench.pool(name, path)]


def _asked(edit: Edit) -> list[Address]:
    """Return the ways in which an edit's record asks for its fact."""
    return [replace(Address.of(edit), prompt=prompt) for prompt in (edit.prompt, *edit.rephrase)]


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
