"""SERAC: edits kept as text; s(x) = max_i exp(-||f(e_i) - f(x)||^2) > 1/2 ? h(y | e_i, x) : p_base(y | x).

Mitchell et al., "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520. A scope classifier with encoder f
finds the stored edit that a prompt is about, if any; then a counterfactual model h answers from the edit's text and the
prompt. Trained on 0.1 NLL of h given the right edit + a balanced cross-entropy of s, in separate parameters. The
decision is made once for each prompt. h shares the base's tokenizer: here a copy of the base whose upper layers are
trained, or another model of the family. -log s is taken as the squared distance, which does not underflow.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.beside import PromptMemory
from everedit.engine.facts import Facts, newest
from everedit.engine.learner import Learner, Metrics
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.errors import NotApplicable, TokenError
from everedit.methods._base import Traits
from everedit.methods._trained import Example, TrainedConfig, TrainedMethod
from everedit.models import LanguageModel, load_model
from everedit.models.layout import Layout
from everedit.models.model import Speaker
from everedit.models.sentences import PACKAGED, load_encoder, require_whole
from everedit.models.tokens import join
from everedit.patch import Patch

_LONGEST = 256
_ROWS_A_PASS = 64


class SeracConfig(TrainedConfig):
    """Settings of SERAC, those of the paper; its encoder is DistilBERT, read at the first token."""

    counterfactual: str | None = Field(
        None, description="h: a model with the base's tokenizer; None: a copy of the base"
    )
    layers: tuple[int, ...] | None = Field(None, description="layers of h that are trained; None: the upper third")
    encoder: str = Field(PACKAGED, description="f: the packaged sentence encoder, a folder or a hub id")
    pooling: Literal["mean", "first"] = Field(
        "mean", description="f is the mean over tokens, or the first token's state"
    )
    unit: bool = Field(True, description="f has length 1")
    gamma: float = Field(1.0, gt=0, description="s = exp(-gamma ||.||^2)")
    mode: Literal["hard", "soft"] = Field(
        "hard", description="one of the two models answers, or both: (1 - s) p_base + s p_h, as in EasyEdit"
    )
    limit: float = Field(0.5, gt=0, lt=1, description="the least s that is in scope")
    train_encoder: bool = Field(True, description="train f too, or h alone")
    lr: float = Field(1e-5, gt=0, description="Adam's learning rate in training")
    c_edit: float = Field(0.1, ge=0, description="weight of the counterfactual model's loss")
    c_scope: float = Field(1.0, ge=0, description="weight of the classifier's loss")
    all_negatives: bool = Field(False, description="every other text with every edit, or the j-th with the j-th alone")

    def resolved(self, layout: Layout) -> SeracConfig:
        """Return the config with the trained layers of a copy of the base."""
        config = self.with_searched(layout)
        layers = config.layers or tuple(range(layout.n_layers - max(1, layout.n_layers // 3), layout.n_layers))
        return config.model_copy(update={"layers": layers})


class SeracLearner(Learner):
    """The encoder f and the trained blocks of h."""

    def __init__(self, lm: LanguageModel, config: SeracConfig) -> None:
        super().__init__(lm)
        self.config = config
        assert config.layers is not None
        self.encoder, self.tokenizer = load_encoder(config.encoder)
        self._speaker = [_counterfactual(lm, config)]
        blocks = [self.speaker.layout.block(layer) for layer in config.layers]
        self.blocks = nn.ModuleList(blocks).requires_grad_(True)
        self.encoder.requires_grad_(config.train_encoder)
        self.to(lm.device)

    @property
    def speaker(self) -> LanguageModel:
        """h, with the trained blocks in it."""
        return self._speaker[0]

    def train(self, mode: bool = True) -> SeracLearner:
        """Keep dropout off, as published: a training is then a function of its data and its seed."""
        super().train(mode)
        self.encoder.eval()
        self.blocks.eval()
        return self

    def groups(self) -> list[dict[str, Any]]:
        """Return encoder and blocks with one rate."""
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        return [{"params": trained, "lr": self.config.lr}]

    def embed(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Tensor:
        """Return f (n, d) of texts, or of pairs of texts."""
        parts = [slice(at, at + _ROWS_A_PASS) for at in range(0, len(texts), _ROWS_A_PASS)]
        return torch.cat([self._embedded(texts[part], None if pairs is None else pairs[part]) for part in parts])

    def _embedded(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Tensor:
        second = None if pairs is None else list(pairs)
        inputs = self.tokenizer(
            list(texts), second, padding=True, truncation=True, return_tensors="pt", max_length=_LONGEST
        ).to(self.lm.device)
        states = self.encoder(**inputs).last_hidden_state
        if self.config.pooling == "first":
            found = states[:, 0]
        else:
            mask = inputs["attention_mask"][..., None].to(states)
            found = (states * mask).sum(1) / mask.sum(1)
        return F.normalize(found, dim=1) if self.config.unit else found

    def require_whole(self, edit: Edit) -> None:
        """Raise :class:`TokenError` if only the beginning of an edit is read, so that others would be taken for it."""
        tokens = self.tokenizer(edit.prompt, edit.target_new, truncation=False, verbose=False)["input_ids"]
        require_whole(len(tokens), _LONGEST, edit.prompt)

    def distances(self, facts: Tensor, queries: Tensor) -> Tensor:
        """Return -log s (facts, queries), gamma times the squared distances."""
        exact = torch.cdist(facts, queries, compute_mode="donot_use_mm_for_euclid_dist")
        return self.config.gamma * exact.pow(2)

    def forward(self, examples: Sequence[Edit]) -> tuple[Tensor, Metrics]:
        """Return the loss of both parts with the examples as the only edits in memory."""
        config = self.config
        prompts = [edit.prompt for edit in examples]
        facts = self.embed(prompts, [edit.target_new for edit in examples])
        inside = [text for edit in examples for text in (edit.prompt, (edit.rephrase or (edit.prompt,))[0])]
        gold = torch.arange(len(examples), device=facts.device).repeat_interleave(2)
        near = self.distances(facts, self.embed(inside))
        far = self.distances(facts, self.embed([edit.locality[0].prompt for edit in examples]))
        positive = near[gold, torch.arange(len(inside), device=facts.device)]
        negative = far.flatten() if config.all_negatives else far.diagonal()
        scope = positive.mean() - _log_one_minus(negative).mean()
        # Half of the queries are the edit itself, half the edit in other words.
        texts = [
            self.speaker.encode(counterfactual_prompt(*item, query), item[1])
            for query, item in zip(inside, ((e.prompt, e.target_new) for e in examples for _ in range(2)), strict=True)
        ]
        tail = Tail.of(self.speaker, texts, self.lowest, kept=self.kept)
        logits = tail.logits()
        likely = (F.cross_entropy(logits, tail.labels, reduction="none") * tail.forced.shares).sum()
        limit = -torch.tensor(config.limit).log()
        figures = {
            "nll": float(likely.detach()),
            "scope": float(scope.detach()),
            "in_scope": float((near.detach().min(0).values < limit).float().mean()),
            "out_of_scope": float((far.detach().min(0).values >= limit).float().mean()),
            "reliability": float((logits.argmax(-1) == tail.labels).float().mean()),
        }
        loss = config.c_edit * likely + config.c_scope * scope
        return loss, {"loss": float(loss.detach()), **figures}

    @property
    def lowest(self) -> int:
        """The lowest trained layer of h."""
        assert self.config.layers is not None
        return min(self.config.layers)


def _log_one_minus(distance: Tensor) -> Tensor:
    """Return log(1 - exp(-d)), with 1 - s no smaller than float's epsilon."""
    return (-torch.expm1(-distance)).clamp_min(torch.finfo(distance.dtype).eps).log()


def counterfactual_prompt(prompt: str, target: str, query: str) -> str:
    """Return what h reads: the edit's prompt and target, and the query."""
    return join(join(prompt, target), query)


def _counterfactual(lm: LanguageModel, config: SeracConfig) -> LanguageModel:
    assert config.layers is not None
    if config.counterfactual is not None:
        other = load_model(config.counterfactual, device=lm.device, dtype=lm.dtype)
        if other.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise NotApplicable(
                what=f"the counterfactual model {config.counterfactual} has another vocabulary than {lm.name}",
                fix="choose a model of the base's family, or none: a copy of the base",
            )
        return other
    # Only the trained blocks are copied; what is frozen is the base's own.
    trained = {id(weight) for layer in config.layers for weight in lm.layout.block(layer).parameters()}
    shared = {id(weight): weight for weight in lm.model.parameters() if id(weight) not in trained}
    return LanguageModel(f"{lm.name} (counterfactual)", copy.deepcopy(lm.model, dict(shared)), lm.tokenizer)


@dataclass
class ScopedMemory(PromptMemory):
    """Stored edits, and who answers what they are about."""

    facts: Facts
    learner: SeracLearner

    def scores(self, prompts: Sequence[str]) -> Tensor:
        """Return s (facts, prompts)."""
        with torch.no_grad():
            queries = self.learner.embed(prompts)
            return (-self.learner.distances(self.facts.embeddings.to(queries), queries)).exp()

    def speakers(self, lm: LanguageModel, prompts: Sequence[str], room: Sequence[int]) -> list[Speaker]:
        """Return who answers each prompt, and from what text."""
        best = self.scores(prompts).max(0)
        found = []
        for prompt, score, fact, tokens in zip(prompts, best.values.tolist(), best.indices.tolist(), room, strict=True):
            soft = self.learner.config.mode == "soft"
            if not soft and score <= self.learner.config.limit:
                found.append(Speaker(lm, prompt))
                continue
            whole = counterfactual_prompt(*self.facts[fact], prompt)
            if len(lm.encode(whole).ids) + tokens > lm.context_tokens:
                raise TokenError(
                    what="a prompt and the edit it is about do not fit the model's context",
                    where=f"{prompt[:60]!r}…",
                    fix="shorten the prompt",
                )
            other = Speaker(self.learner.speaker, whole)
            found.append(Speaker(lm, prompt, second=other, share=score) if soft else other)
        return found


class Serac(TrainedMethod):
    """A scope classifier and a counterfactual model beside the base."""

    name = "serac"
    traits = Traits(
        title="SERAC, a scope classifier and a counterfactual model",
        paper="arXiv 2206.06520",
        changes="prompt",
        needs_subject=False,
        needs_moments=False,
        needs_training=True,
        solves_batches=True,
        keeps_state=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = SeracConfig
    config: SeracConfig
    training: ClassVar[dict[str, Any]] = {
        "steps": 1_000_000, "batch": 10, "accumulation": 10, "clip": 100.0, "check_every": 5_000, "patience": 40_000,
    }  # fmt: skip

    def layers(self) -> tuple[int, ...]:
        """Return none: nothing in the base changes."""
        return ()

    def learner(self, bench: Workbench) -> Learner:
        """Return the encoder and the counterfactual model as they come."""
        return SeracLearner(bench.lm, self.config)

    def check_example(self, bench: Workbench, edit: Edit) -> None:
        """Raise an error too if edit and query together do not fit the context."""
        Example.of(bench.lm, edit)
        self.check_edit(bench, edit)

    def check_edit(self, bench: Workbench, edit: Edit) -> None:
        """Raise an error too if edit and query together do not fit the context."""
        for query in (edit.prompt, *edit.rephrase):
            bench.lm.encode(counterfactual_prompt(edit.prompt, edit.target_new, query), edit.target_new)

    def memory(self, bench: Workbench, state: State) -> ScopedMemory | None:
        """Return the stored edits with their router; None if there are none."""
        facts = Facts.of(state)
        if facts is None:
            return None
        learner = self.trained(bench)
        assert isinstance(learner, SeracLearner)
        return ScopedMemory(facts, learner)

    def addresses(self, bench: Workbench, edits: Sequence[Edit]) -> Tensor:
        """Return the embeddings of the prompts, which stored edits are compared with."""
        learner = self.trained(bench)
        assert isinstance(learner, SeracLearner)
        with torch.no_grad():
            return learner.embed([edit.prompt for edit in edits])

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the edits' embeddings as what was written, and all stored edits."""
        learner = self.trained(bench)
        assert isinstance(learner, SeracLearner)
        stored = newest(edits)
        for edit in stored:
            self.check_edit(bench, edit)
            learner.require_whole(edit)
        with bench.clock.phase("embed"), torch.no_grad():
            embeddings = learner.embed([edit.prompt for edit in stored], [edit.target_new for edit in stored])
        facts = Facts.of(state) or Facts.none(embeddings.shape[1], embeddings.device)
        after = facts.plus(stored, embeddings)
        return Patch({}, memory={self.name: embeddings}), State(after.tensors(), {"facts": len(after)})


METHOD = Serac
