"""CaliNet: out = FFN(h) + act(h K^T) V with a few slots K, V, trained on many wordings of the facts, all else frozen.

Dong et al., "Calibrating Factual Knowledge in Pretrained Language Models", Findings of EMNLP 2022, arXiv 2210.03329.
Facts are calibrated together; a later batch gets slots of its own beside the frozen earlier ones. V starts at zero, so
that nothing changes before training (the released code starts it at random). Gated models get gated slots. An edit
brings no paraphrases of its own to train on: they are its prompt behind sampled prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.engine.assess import contrastive_assessment
from everedit.engine.bench import Workbench
from everedit.engine.slots import Slots
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._beside import STARTS, BesideConfig, BesideMethod, Contexts, templated
from everedit.models.tokens import Encoded
from everedit.patch import Patch

_ROWS_A_STEP = 64


class CalinetConfig(BesideConfig):
    """Settings of CaliNet; None means the published value for the family."""

    slots: int = Field(64, ge=1, description="d_c, new slots for each batch of edits")
    steps: int = Field(5000, ge=1, description="most gradient steps on a batch")
    lr: float = Field(1e-2, gt=0, description="Adafactor's constant learning rate")
    stop_loss: float = Field(0.02, ge=0, description="training stops below this mean loss; published: never")
    gated: bool | None = Field(None, description="gated slots; None: as the model's MLP is")
    activation: Literal["relu", "model"] = Field("model", description="the slots' activation: ReLU, or the model's own")
    contexts: Contexts = Field(((6, 5), (11, 5)), description="sampled prefixes: (total tokens, how many)")
    assess: bool = Field(
        False, description="leave edits alone whose target the model prefers behind its own prompt already (CKA >= 1)"
    )
    negatives: int = Field(3, ge=1, description="prompts of other relations that an assessment compares with")
    irrelevant: str = Field("worldfacts", description="data set of these prompts")
    irrelevant_path: str | None = Field(None, description="its file, where it does not ship with Everedit")


class Calinet(BesideMethod):
    """Calibration slots beside one MLP."""

    name = "calinet"
    traits = Traits(
        title="CaliNet, calibration slots",
        paper="arXiv 2210.03329",
        changes="module",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        keeps_state=True,
        writes_mlp_values=False,
    )
    Config = CalinetConfig
    config: CalinetConfig

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the empty prefix and the sampled ones."""
        return bench.contexts(self.config.contexts, STARTS)

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass of the upper layers for a twentieth of the steps."""
        rows = 1 + sum(count for _, count in self.config.contexts)
        return 2 * self.config.steps / 20 * rows * tokens / 6

    def memory(self, bench: Workbench, state: State) -> Slots | None:
        """Return all slots; None before the first."""
        if "keys" not in state.tensors:
            return None
        return self._slots(bench, dict(state.tensors))

    def _slots(self, bench: Workbench, parts: dict[str, Tensor]) -> Slots:
        act = F.relu if self.config.activation == "relu" else bench.lm.layout.activation
        return Slots(self.layer, act, parts["keys"], parts["values"], gates=parts.get("gates"))

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the new slots' values, and all slots."""
        # A fact that is given twice is one fact.
        facts = list({(edit.prompt, edit.target_new): edit for edit in edits}.values())
        wanted = [edit for edit in facts if not (self.config.assess and self._knows(bench, edit))]
        values = {"left_alone": int(state.values.get("left_alone", 0)) + len(facts) - len(wanted)}
        if not wanted:
            return Patch({}), State(state.tensors, values)
        texts = [text for edit in wanted for text in templated(bench, edit, self.config.contexts)]
        with bench.clock.phase("train"):
            fresh = self._trained(bench, texts, self.memory(bench, state), len(state.tensors.get("keys", ())))
        if not bool(fresh["values"].any()):
            # All of them are known well enough from the start.
            return Patch({}), State(state.tensors, values)
        whole = {name: torch.cat([state.tensors[name], part]) for name, part in fresh.items() if state.tensors}
        return Patch({}, memory={self.name: fresh["values"]}), State(whole or fresh, values)

    def _knows(self, bench: Workbench, edit: Edit) -> bool:
        """Whether the target is likelier behind the edit's prompt than behind prompts of other relations."""
        if edit.subject is None:
            return False
        source = self.config.irrelevant, self.config.irrelevant_path

        def asked() -> list[tuple[str, str]]:
            return [(other.prompt, other.subject) for other in bench.pool(*source) if other.subject]

        found = bench.once(("other relations", *source), asked)
        others = [prompt.replace(subject, edit.subject) for prompt, subject in found]
        negatives = [prompt for prompt in dict.fromkeys(others) if prompt != edit.prompt]
        chosen = negatives[:: max(1, len(negatives) // self.config.negatives)][: self.config.negatives]
        return contrastive_assessment(bench.lm, edit.prompt, chosen, edit.target_new) >= 1

    def _trained(
        self, bench: Workbench, texts: Sequence[Encoded], earlier: Slots | None, begun: int
    ) -> dict[str, Tensor]:
        """Return new slots trained on the texts' targets, beside the earlier ones."""
        config, lm = self.config, bench.lm
        parts = self._new(bench, begun)
        tails = [Tail.of(lm, texts[at : at + _ROWS_A_STEP], self.layer) for at in range(0, len(texts), _ROWS_A_STEP)]
        optimiser = _adafactor(list(parts.values()), config.lr)
        new = self._slots(bench, parts)

        def change(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            value = value if earlier is None else value + earlier.added(query).to(value.dtype)
            return value + new.added(query).to(value.dtype)

        for _ in range(config.steps):
            total = 0.0
            optimiser.zero_grad(set_to_none=True)
            for tail in tails:
                with tail.changed(change):
                    loss = tail.loss() * len(tail) / len(texts)
                    loss.backward()
                total += float(loss.detach())
            if total < config.stop_loss:
                break
            optimiser.step()
        return {name: part.detach() for name, part in parts.items()}

    def _new(self, bench: Workbench, begun: int) -> dict[str, Tensor]:
        """Return slots with random keys, as a linear layer starts, and values of zero."""
        layout, random = bench.lm.layout, torch.Generator().manual_seed(bench.seed * 1_000_003 + begun)
        shape, bound = (self.config.slots, layout.hidden_size), 1 / math.sqrt(layout.hidden_size)
        gated = len(layout.mlp_in_names) > 1 if self.config.gated is None else self.config.gated
        names = ["keys", "gates"] if gated else ["keys"]
        parts = {name: (torch.rand(shape, generator=random) * 2 - 1) * bound for name in names}
        parts["values"] = torch.zeros(shape)
        return {name: part.to(bench.lm.device).requires_grad_() for name, part in parts.items()}


def _adafactor(parts: list[Tensor], lr: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parts, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)


METHOD = Calinet
