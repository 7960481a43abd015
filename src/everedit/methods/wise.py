"""WISE: out = W' a for a prompt with ||phi(W' a) - phi(W a)|| above a threshold learned with the edits, else W a.

Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", NeurIPS 2024,
arXiv 2405.14768. The side memory W', a copy of one down projection, takes the edits: L = L_ft + [D(x_i) - alpha]_+ +
[beta - D(x_e)]_+ + [gamma - (D(x_e) - D(x_i))]_+, each edit inside a random mask of its shard. Full shards are merged
by TIES, and the result is the only memory (merge) or one of several (retrieve). phi, the ratio in front of the
threshold, the maximum over long texts and the replay of earlier edits, [D - alpha]_+ for one of each other memory and
[beta - D]_+ for one of this, come from the released code, whose alpha, beta and gamma belong to them.

Here the memory is chosen once, from the prompt, and answers until the sequence ends; ``routing="call"`` asks anew at
each forward pass, as released. Weight decay pulls toward W inside the mask; released, it pulls everything toward zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.side_memory import SideMemory, margin_loss, replay_loss, shift_of_activations
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.engine.ties import ties_merge
from everedit.methods._base import Traits
from everedit.methods._beside import STARTS, BesideConfig, BesideMethod, Contexts, irrelevant_texts, pick, templated
from everedit.models.hooks import replaced_weight
from everedit.models.layout import Layout
from everedit.models.tokens import Encoded, join
from everedit.patch import Patch

Margins = tuple[float, float, float]
Ids = tuple[int, ...]
# Published alpha, beta, gamma, number of steps and ratio in front of the threshold, by family and number of layers.
_PUBLISHED: dict[tuple[str, int], tuple[Margins, int, float]] = {
    ("llama", 32): ((5.0, 20.0, 10.0), 70, 0.88),
    ("gptj", 28): ((15.0, 40.0, 20.0), 70, 0.88),
    ("gpt2", 48): ((5.0, 20.0, 10.0), 40, 0.8),
}
_USUAL = _PUBLISHED["llama", 32]


class WiseConfig(BesideConfig):
    """Settings of WISE; None means the published value for the family."""

    published_layers: ClassVar[dict[tuple[str, int], int]] = {("gpt2", 48): 8, ("gptj", 28): 21, ("llama", 32): 27}

    memories: Literal["merge", "retrieve"] = Field("merge", description="one merged memory, or all of them")
    margins: Margins | None = Field(None, description="alpha, beta, gamma of the margin loss")
    ratio: float | None = Field(None, gt=0, description="a memory answers above so many of its threshold")
    density: float = Field(0.2, gt=0, le=1, description="rho, the share of entries that a shard may change")
    shard_edits: int = Field(500, ge=1, description="edits in a shard")
    shards: int = Field(2, ge=1, description="k, the shards that are merged")
    kept: float = Field(0.53, gt=0, le=1, description="share of each shard's changes that TIES keeps")
    steps: int | None = Field(None, ge=1, description="most gradient steps on an edit")
    lr: float = Field(1.0, gt=0, description="learning rate of plain gradient descent")
    box: float = Field(1.0, gt=0, description="the most that an entry may differ from the main memory's")
    stop_loss: float = Field(0.02, ge=0, description="training stops when the loss is below this and stands still")
    stop_change: float = Field(1e-4, ge=0, description="a smaller change of the loss is standing still")
    weight_decay: float = Field(1e-5, ge=0, description="pull toward the main memory at each step, inside the mask")
    contexts: Contexts = Field(((6, 5), (11, 5)), description="sampled prefixes: (total tokens, how many)")
    irrelevant: str = Field("worldfacts", description="data set of the texts that no edit is about")
    irrelevant_path: str | None = Field(None, description="its file, where it does not ship with Everedit")
    replay: bool = Field(False, description="also train the scores of earlier edits; their prompts are kept")
    compete: bool = Field(False, description="train an edit's score to gamma above what the other memories give it")
    routing: Literal["prompt", "call"] = Field(
        "prompt", description="what is scored: the prompt, once; or whatever a forward pass holds, as released"
    )

    def resolved(self, layout: Layout) -> Self:
        """Return the config with layer, margins, steps and ratio."""
        config = super().resolved(layout)
        margins, steps, ratio = _PUBLISHED.get((layout.family.name, layout.n_layers), _USUAL)
        return config.model_copy(
            update={
                "margins": config.margins or margins,
                "steps": config.steps or steps,
                "ratio": config.ratio or ratio,
            }
        )


@dataclass(frozen=True)
class _Shelf:
    """All that WISE keeps: changes (H, D) of the main memory, and the smallest scores of the edits behind them.

    ``filling`` takes the edits of the present shard inside ``mask``; ``full`` shards wait to be merged; what was merged
    is ``done``. ``asked`` are the texts of all edits, kept for replay.
    """

    filling: Tensor
    mask: Tensor
    full: Tensor
    full_thresholds: Tensor
    done: Tensor
    done_thresholds: Tensor
    edits: int
    threshold: float
    asked: tuple[str, ...]

    @classmethod
    def of(cls, state: State, shape: torch.Size, device: torch.device) -> _Shelf:
        values = state.values
        if not values:
            zero, none = torch.zeros(shape, device=device), torch.zeros(0, *shape, device=device)
            empty = torch.zeros(0, device=device)
            return cls(zero, zero.bool(), none, empty, none, empty, 0, float("inf"), ())
        asked = tuple(values.get("asked", ()))
        return cls(**state.tensors, edits=values["edits"], threshold=values["threshold"], asked=asked)

    def state(self) -> State:
        names = ("filling", "mask", "full", "full_thresholds", "done", "done_thresholds")
        tensors = {name: getattr(self, name) for name in names}
        values = {"edits": self.edits, "threshold": self.threshold, "memories": len(self.done)}
        return State(tensors, values | ({"asked": list(self.asked)} if self.asked else {}))


@dataclass(frozen=True)
class _Rows:
    """Token ids whose scores an edit trains: its own, a text that it is not about, and earlier edits."""

    own: list[Ids]
    other: Ids
    same_memory: list[Ids]
    other_memories: list[Ids]

    def all(self) -> list[Ids]:
        return [*self.own, self.other, *self.same_memory, *self.other_memories]

    def loss(self, scores: Tensor, floors: Tensor, margins: Margins) -> Tensor:
        """Return what the margins ask of the rows' scores; ``floors`` stand for beta."""
        alpha, _, gamma = margins
        own, other, same, others = self._parts(scores)
        own_floors, _, same_floors, _ = self._parts(floors)
        return margin_loss(own, other[0], (alpha, own_floors, gamma)) + replay_loss(same, others, alpha, same_floors)

    def _parts(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split([len(self.own), 1, len(self.same_memory), len(self.other_memories)])


class Wise(BesideMethod):
    """A main and a side memory with a router between them."""

    name = "wise"
    traits = Traits(
        title="WISE, a side memory that prompts are routed to",
        paper="arXiv 2405.14768",
        changes="module",
        needs_subject=False,
        needs_moments=False,
        keeps_state=True,
        writes_mlp_values=False,
    )
    Config = WiseConfig
    config: WiseConfig

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the empty prefix and the sampled ones."""
        return bench.contexts(self.config.contexts, STARTS)

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass of the upper layers for each template and step."""
        rows = 2 + sum(count for _, count in self.config.contexts)
        return 2 * (self.config.steps or 0) * rows * tokens / 6

    def memory(self, bench: Workbench, state: State) -> SideMemory | None:
        """Return the side memories with their router; None before the first edit."""
        if not state.values:
            return None
        config, main = self.config, self._main(bench)
        shelf = _Shelf.of(state, main.shape, main.device)
        assert config.ratio is not None
        # Shards that wait to be merged answer too: their edits would be forgotten until then.
        changes = [*shelf.done, *shelf.full]
        thresholds = [*shelf.done_thresholds.tolist(), *shelf.full_thresholds.tolist()]
        if bool(shelf.filling.any()):
            changes, thresholds = [*changes, shelf.filling], [*thresholds, shelf.threshold]
        if config.memories == "merge":
            thresholds = [min(thresholds)] * len(changes)
        limits = torch.tensor([config.ratio * threshold for threshold in thresholds], device=main.device)
        hold = config.routing == "prompt"
        return SideMemory(self.layer, torch.stack(changes), limits, bench.lm.layout.activation, hold)

    def _main(self, bench: Workbench) -> Tensor:
        return bench.weight(bench.lm.layout.mlp_out_weight(self.layer))

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return how the edits changed the side memory, and all memories after them."""
        main = self._main(bench)
        shelf = _Shelf.of(state, main.shape, main.device)
        # What is scored is what the router will see: prompts, or whatever is read.
        asked = self.config.routing == "prompt"
        texts = irrelevant_texts(bench, self.config.irrelevant, self.config.irrelevant_path, answers=not asked)
        change = torch.zeros_like(main)
        for edit in edits:
            if shelf.edits % self.config.shard_edits == 0:
                shelf = replace(shelf, mask=self._mask(bench, shelf))
            written = templated(bench, edit, self.config.contexts)
            seen = [row.ids[: row.prompt_end] if asked else row.ids for row in written]
            other = bench.lm.encode(pick(texts, shelf.edits, edit)).ids
            rows = _Rows(seen, other, *self._replayed(bench, shelf))
            with bench.clock.phase("train"):
                trained, score = self._trained(bench, main, shelf, written, rows)
            change += trained - shelf.filling
            threshold = min(shelf.threshold, score)
            if self.config.replay:
                text = edit.prompt if asked else join(edit.prompt, edit.target_new)
                shelf = replace(shelf, asked=(*shelf.asked, text))
            shelf = self._shelved(replace(shelf, filling=trained, threshold=threshold, edits=shelf.edits + 1))
        return Patch({}, memory={self.name: change}), shelf.state()

    def _mask(self, bench: Workbench, shelf: _Shelf) -> Tensor:
        random = torch.Generator().manual_seed(bench.seed * 1_000_003 + shelf.edits)
        return (torch.rand(shelf.filling.shape, generator=random) < self.config.density).to(shelf.filling.device)

    def _replayed(self, bench: Workbench, shelf: _Shelf) -> tuple[list[Ids], list[Ids]]:
        """Return the ids of an earlier edit of the shard that is being filled, if there is one, and of each memory.

        Shards that are to be merged with it are neither; merged again and again, all are one memory.
        """
        config, asked = self.config, shelf.asked
        size = config.shard_edits * config.shards
        done = shelf.edits // size if config.memories == "retrieve" else 0
        groups = [asked[number * size : (number + 1) * size] for number in range(done)]
        present = asked[shelf.edits - shelf.edits % config.shard_edits :]
        random = torch.Generator().manual_seed(bench.seed * 1_000_003 + shelf.edits)
        drawn = [group[int(torch.randint(len(group), (), generator=random))] for group in (*groups, present) if group]
        ids = [bench.lm.encode(text).ids for text in drawn]
        others = sum(map(bool, groups))
        return ids[others:], ids[:others]

    def _trained(
        self, bench: Workbench, main: Tensor, shelf: _Shelf, written: Sequence[Encoded], rows: _Rows
    ) -> tuple[Tensor, float]:
        """Return the side memory's change (H, D) after training on one edit, and the edit's score."""
        config, lm = self.config, bench.lm
        assert config.margins is not None
        assert config.steps is not None
        module, act = lm.layout.mlp_out(self.layer), lm.layout.activation
        tail = Tail.of(lm, written, self.layer)
        batch = lm.pad(rows.all())
        keys = lm.inputs_of({"key": module}, batch)["key"].view(*batch.ids.shape, -1)
        outputs, real = module(keys), batch.mask.bool()

        def moved(change: Tensor) -> Tensor:
            return shift_of_activations(keys, outputs, F.linear(keys, change), act, real)

        rivals = [moved(other) for other in (*shelf.done, *shelf.full)] if config.compete else []
        floors = self._floors(rivals, len(batch.ids), main)
        side = main + shelf.filling
        before, score = float("inf"), 0.0
        for step in range(config.steps + 1):
            weight = side.clone().requires_grad_()
            with replaced_weight(module, weight):
                fitting = tail.loss()
            scores = moved(weight - main)
            loss = fitting + rows.loss(scores, floors, config.margins)
            score, now = float(scores[: len(rows.own)].detach().mean()), float(loss.detach())
            if (now <= config.stop_loss and abs(before - now) <= config.stop_change) or step == config.steps:
                # The last pass is for the score of what is kept.
                break
            before = now
            (gradient,) = torch.autograd.grad(loss, [weight])
            pull = config.weight_decay * (side - main)
            side = side - config.lr * shelf.mask * (gradient + pull)
            side = torch.clamp(side, main - config.box, main + config.box)
        return side - main, score

    def _floors(self, rivals: Sequence[Tensor], rows: int, like: Tensor) -> Tensor:
        """Return the least score (rows,) that an edit is trained to, given those that the other memories give it."""
        assert self.config.margins is not None
        _, beta, gamma = self.config.margins
        floors = like.new_full((rows,), beta)
        return torch.stack([floors, *(rival + gamma for rival in rivals)]).amax(0)

    def _shelved(self, shelf: _Shelf) -> _Shelf:
        """Put a full shard away, and merge as many as belong together."""
        config = self.config
        if shelf.edits % config.shard_edits:
            return shelf
        full = torch.cat([shelf.full, shelf.filling[None]])
        limits = torch.cat([shelf.full_thresholds, shelf.full_thresholds.new_tensor([shelf.threshold])])
        empty = torch.zeros_like(shelf.filling)
        if len(full) < config.shards:
            return replace(shelf, full=full, full_thresholds=limits, filling=empty, threshold=float("inf"))
        done, done_limits = shelf.done, shelf.done_thresholds
        if config.memories == "merge":
            # What was merged before counts as one more shard.
            full, limits = torch.cat([done, full]), torch.cat([done_limits, limits])
            done, done_limits = done[:0], done_limits[:0]
        # A shard alone has nothing to be merged with, and is not trimmed for it.
        merged = ties_merge(full, config.kept) if len(full) > 1 else full[0]
        return replace(
            shelf,
            filling=empty,
            threshold=float("inf"),
            full=full[:0],
            full_thresholds=limits[:0],
            done=torch.cat([done, merged[None]]),
            done_thresholds=torch.cat([done_limits, limits.min()[None]]),
        )


METHOD = Wise
