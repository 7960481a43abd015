"""IKE: p(y) = P(y | C, f, x): demonstrations C of how to treat a new fact f, and f itself, before the query x.

Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023, arXiv 2305.12740. No weight changes.
A demonstration copies a fact, carries it to a paraphrase, or retains another answer, 1 : 3 : 4; they are made from the
k facts of a corpus that are nearest to the edit, the most similar last, and behind them stands a copy of the edit
itself. Published, the method is told which fact a query is about. Here it is the stored fact nearest to the query, by
the cosine of their sentence embeddings, if that is at least ``scope``; with ``scope=-1`` the nearest one always is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field
from torch import Tensor

from everedit.cache import digest
from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.beside import PromptMemory
from everedit.engine.facts import Facts, newest
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import TokenError
from everedit.methods._base import Method, MethodConfig, Traits
from everedit.models import LanguageModel
from everedit.models.model import Speaker
from everedit.models.sentences import PACKAGED, SentenceEncoder
from everedit.models.tokens import join
from everedit.patch import Patch

Kind = Literal["copy", "update", "retain"]
_RATIO: tuple[tuple[Kind, int], ...] = (("copy", 1), ("update", 3), ("retain", 4))


class IkeConfig(MethodConfig):
    """Settings of IKE, those of the paper; EasyEdit takes k = 16, the most similar first, and no copy of the edit."""

    k: int = Field(32, ge=0, description="demonstrations from the corpus")
    order: Literal["ascending", "descending"] = Field("ascending", description="by similarity to the edit")
    self_copy: bool = Field(True, description="one more demonstration that copies the edit")
    scope: float = Field(0.7, ge=-1, le=1, description="the least cosine of a query with the fact it is about")
    demonstrations: str = Field("worldfacts", description="data set of the demonstrations, none of them edited")
    demonstrations_path: str | None = Field(None, description="its file, where it does not ship with Everedit")
    encoder: str = Field(PACKAGED, description="sentence encoder: the packaged one, a folder or a hub id")


@dataclass
class Demonstrations:
    """Facts to make demonstrations from, with their embeddings (n, d)."""

    edits: Sequence[Edit]
    embeddings: Tensor

    def nearest(self, embedding: Tensor, prompt: str, count: int) -> list[Edit]:
        """Return the ``count`` facts nearest to an embedded edit, the nearest first; none about the same subject."""
        order = (self.embeddings @ embedding.to(self.embeddings)).argsort(descending=True).tolist()
        others = (self.edits[index] for index in order if not _same_subject(self.edits[index], prompt))
        return [edit for edit, _ in zip(others, range(count), strict=False)]


def _same_subject(edit: Edit, prompt: str) -> bool:
    return edit.prompt == prompt or (edit.subject is not None and edit.subject.casefold() in prompt.casefold())


def kinds(count: int, rng: random.Random) -> list[Kind]:
    """Return the kinds of ``count`` demonstrations, copy : update : retain as 1 : 3 : 4, in random order."""
    whole: list[Kind] = [kind for kind, share in _RATIO for _ in range(share * (count // 8))]
    spare: list[Kind] = ["retain", "update", "retain", "copy", "update", "retain", "update"]
    whole += spare[: count - len(whole)]
    rng.shuffle(whole)
    return whole


def demonstration(edit: Edit, kind: Kind, rng: random.Random) -> str:
    """Return one demonstration; a fact without a paraphrase or another answer to retain is copied."""
    prompt, answer = edit.prompt, edit.target_new
    if kind == "update" and edit.rephrase:
        prompt = rng.choice(edit.rephrase)
    elif kind == "retain" and edit.locality:
        probe = rng.choice(edit.locality)
        prompt, answer = probe.prompt, probe.answer
    return f"{_statement(edit.prompt, edit.target_new)}\nPrompt: {join(prompt, answer)}\n\n"


def _statement(prompt: str, target: str) -> str:
    return f"New Fact: {join(prompt, target)}"


def _block(prompt: str, target: str) -> str:
    """Return what stands before a query about a fact."""
    return f"{_statement(prompt, target)}\nPrompt:"


@dataclass
class InContext(PromptMemory):
    """Stored facts, and how each is put before a query."""

    facts: Facts
    encoder: SentenceEncoder
    demonstrations: Demonstrations
    config: IkeConfig
    seed: int
    _contexts: dict[int, list[str]] = field(default_factory=dict)

    def speakers(self, lm: LanguageModel, prompts: Sequence[str], room: Sequence[int]) -> list[Speaker]:
        """Return each prompt with the context of the fact that it is about, or as it is."""
        cosine, nearest = self.facts.nearest(self.encoder.embed(prompts))
        found = []
        for prompt, near, fact, tokens in zip(prompts, cosine.tolist(), nearest.tolist(), room, strict=True):
            found.append(self._speaker(lm, prompt, fact, tokens) if near >= self.config.scope else Speaker(lm, prompt))
        return found

    def context(self, fact: int) -> list[str]:
        """Return the demonstrations for a stored fact, in their order, the edit's own copy last."""
        if fact not in self._contexts:
            prompt, target = self.facts[fact]
            own = Edit(prompt=prompt, target_new=target)
            # By the edit and not by the run: what was edited before changes nothing.
            rng = random.Random(f"{self.seed} {digest([prompt, target])}")
            near = self.demonstrations.nearest(self.facts.embeddings[fact], prompt, self.config.k)
            shown = [demonstration(edit, kind, rng) for edit, kind in zip(near, kinds(len(near), rng), strict=True)]
            if self.config.order == "ascending":
                shown.reverse()
            self._contexts[fact] = shown + ([demonstration(own, "copy", rng)] if self.config.self_copy else [])
        return self._contexts[fact]

    def _speaker(self, lm: LanguageModel, prompt: str, fact: int, room: int) -> Speaker:
        shown, ending = self.context(fact), _block(*self.facts[fact])
        most = lm.context_tokens - room
        # The far end goes first, whole demonstrations at a time, and the query block never.
        while True:
            shared = "".join(shown) + ending
            whole = f"{shared} {prompt}"
            tokens = len(lm.tokenizer(whole, verbose=False)["input_ids"])
            if tokens <= most:
                return Speaker(lm, whole, shared)
            if not shown:
                raise TokenError(
                    what=f"a prompt of {tokens} tokens with its new fact leaves no room in the model's context of "
                    f"{lm.context_tokens}",
                    where=f"{prompt[:60]!r}…",
                    fix="shorten the prompt",
                )
            over = max(1, int(len(shown) * (1 - most / tokens)))
            shown = shown[over:]


class Ike(Method):
    """Facts in the context, with demonstrations."""

    name = "ike"
    traits = Traits(
        title="IKE, facts and demonstrations in the context",
        paper="arXiv 2305.12740",
        changes="prompt",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        keeps_state=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = IkeConfig
    config: IkeConfig

    def layers(self) -> tuple[int, ...]:
        """Return none: nothing in the model changes."""
        return ()

    def work(self, tokens: float) -> float:
        """Return an encoder's pass, about a fifth of a small model's."""
        return tokens / 5

    def check_edit(self, bench: Workbench, edit: Edit) -> None:
        """Raise an error too if the encoder reads only a part of the prompt, or the fact and a query about it do not
        fit the context.
        """
        self._encoder(bench).require_whole(edit.prompt)
        for query in (edit.prompt, *edit.rephrase):
            bench.lm.encode(f"{_block(edit.prompt, edit.target_new)} {query}", edit.target_new)

    def memory(self, bench: Workbench, state: State) -> InContext | None:
        """Return the stored facts; None if there are none."""
        facts = Facts.of(state)
        if facts is None:
            return None
        encoder = self._encoder(bench)
        return InContext(facts, encoder, self._demonstrations(bench), self.config, bench.seed)

    def _encoder(self, bench: Workbench) -> SentenceEncoder:
        return bench.once(("sentences", self.config.encoder), lambda: SentenceEncoder(self.config.encoder))

    def _demonstrations(self, bench: Workbench) -> Demonstrations:
        config = self.config

        def made() -> Demonstrations:
            edits = bench.pool(config.demonstrations, config.demonstrations_path) if config.k else []
            texts = [f"{_statement(edit.prompt, edit.target_new)}\nPrompt: {edit.prompt}" for edit in edits]
            return Demonstrations(edits, self._encoder(bench).embed(texts))

        key = ("demonstrations", config.demonstrations, config.demonstrations_path, config.encoder, bool(config.k))
        return bench.once(key, made)

    def addresses(self, bench: Workbench, edits: Sequence[Edit]) -> Tensor:
        """Return the embeddings of the prompts, which facts are found by."""
        return self._encoder(bench).embed([edit.prompt for edit in edits])

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the facts' embeddings as what was written, and all facts."""
        encoder, stored = self._encoder(bench), newest(edits)
        for edit in stored:
            self.check_edit(bench, edit)
        with bench.clock.phase("embed"):
            embeddings = encoder.embed([edit.prompt for edit in stored])
        facts = Facts.of(state) or Facts.none(encoder.width, embeddings.device)
        after = facts.plus(stored, embeddings)
        return Patch({}, memory={self.name: embeddings}), State(after.tensors(), {"facts": len(after)})


METHOD = Ike
