"""KE: dW = s sigmoid(eta) (grad_W L * A + B) with A = softmax(r_a) c_a^T and B = softmax(r_b) c_b^T from a network.

De Cao et al., "Editing Factual Knowledge in Language Models", EMNLP 2021, arXiv 2104.08164. A BiLSTM reads "old answer
>> new answer || prompt"; its state gives every weight's vectors r, c and the scale eta. Trained on the new answer's
likelihood subject to KL(p_base || p_edited) <= margin on other texts, by a Lagrange multiplier that climbs by gradient
ascent and a margin that tightens once edits succeed; or, as in the GPT and T5 port, on a weighted sum of the two.
The dense gradient is never formed: with grad = sum_t delta_t u_t^T, grad * (r c^T) = sum_t (r delta_t) (c u_t)^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.learner import Learner, Metrics
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._trained import (
    Example,
    TrainedConfig,
    TrainedMethod,
    base_log_probabilities,
    changed_weights,
    edit_gradients,
    kl_to_base,
)
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import LowRank, Patch


class KeConfig(TrainedConfig):
    """Settings of KE: those of the paper for generation (zsRE)."""

    hidden: int = Field(128, ge=1, description="width of each weight's own layer")
    condition: int = Field(1024, ge=1, description="width of the condition")
    lstm: int = Field(256, ge=1, description="width of the LSTM in each direction")
    max_scale: float = Field(1.0, gt=0, description="s, the largest scale of a change")
    objective: Literal["lagrangian", "weighted"] = Field(
        "lagrangian", description="weighted: c_edit NLL + c_loc KL, as in the port to GPT and T5"
    )
    lr: float = Field(3e-4, gt=0, description="learning rate in training: RMSprop's, or Adam's of the weighted sum")
    warm_up: int = Field(1_000, ge=1, description="passes over which the learning rate climbs")
    falls_over: int = Field(200_000, ge=1, description="passes over which it falls to zero")
    multiplier_lr: float = Field(0.1, gt=0, description="learning rate of the multiplier")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing of the edit's loss")
    margin: float = Field(1e-3, gt=0, description="the largest KL divergence at the start of training")
    least_margin: float = Field(1e-5, gt=0, description="and at its end")
    c_edit: float = Field(0.1, ge=0, description="weight of the edit's loss in the weighted sum")
    c_loc: float = Field(1.0, ge=0, description="weight of the KL divergence in it")


class KeLearner(Learner):
    """The condition's encoder, a small network for each weight, the multiplier and the margin."""

    margin: Tensor

    def __init__(self, lm: LanguageModel, names: Sequence[str], config: KeConfig, seed: int) -> None:
        super().__init__(lm)
        self.names, self.config = list(names), config
        self.shapes = {name: tuple(oriented(lm.layout.module_of(name)).shape) for name in names}
        # Initial weights come from torch's generator, which is put back.
        with torch.random.fork_rng():
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            width = lm.model.get_input_embeddings().weight.shape[1]
            self.encoder = nn.LSTM(width, config.lstm, batch_first=True, bidirectional=True)
            self.condition = nn.Linear(2 * config.lstm, config.condition)
            self.heads = nn.ModuleList(
                nn.Sequential(
                    weight_norm(nn.Linear(config.condition, config.hidden)),
                    nn.Tanh(),
                    weight_norm(nn.Linear(config.hidden, 2 * sum(self.shapes[name]) + 1)),
                )
                for name in names
            )
        self.multiplier = nn.Parameter(torch.ones(()))
        self.register_buffer("margin", torch.tensor(config.margin))
        self.to(lm.device)

    def groups(self) -> list[dict[str, Any]]:
        """Return the networks, and the multiplier, which climbs."""
        networks = [weight for name, weight in self.named_parameters() if name != "multiplier"]
        found: list[dict[str, Any]] = [{"params": networks, "lr": self.config.lr}]
        if self.config.objective == "lagrangian":
            found.append({"params": [self.multiplier], "lr": self.config.multiplier_lr, "maximize": True})
        return found

    def optimiser(self) -> Any:
        """Return centred RMSprop, or the port's Adam."""
        if self.config.objective == "weighted":
            return super().optimiser()
        return torch.optim.RMSprop(self.groups(), centered=True, foreach=False)

    def rate(self, step: int) -> float:
        """Return a linear warm-up over the first steps, and a linear fall to nothing."""
        if self.config.objective == "weighted":
            return 1.0
        return min(1.0, step / self.config.warm_up) * max(0.0, 1 - step / self.config.falls_over)

    def after_step(self) -> None:
        """Keep the multiplier from becoming negative."""
        with torch.no_grad():
            self.multiplier.clamp_(min=0)

    def after_validation(self, metrics: Metrics) -> None:
        """Tighten the margin once nine edits in ten succeed."""
        if metrics["reliability"] > 0.9:
            self.margin.copy_((0.8 * self.margin).clamp(min=self.config.least_margin))

    def read(self, condition: str) -> Tensor:
        """Return the condition's vector (condition,)."""
        ids = torch.tensor([self.lm.tokenizer(condition, verbose=False)["input_ids"]], device=self.lm.device)
        # The base model's own embeddings, which stay as they are.
        embedded = self.lm.model.get_input_embeddings()(ids).detach().float()
        _, (state, _) = self.encoder(embedded)
        vector: Tensor = self.condition(state.transpose(0, 1).reshape(-1)).tanh()
        return vector

    def vectors(self, number: int, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return c_a, softmax(r_a), c_b, softmax(r_b) and sigmoid(eta) of a weight."""
        d_out, d_in = self.shapes[self.names[number]]
        col_a, row_a, col_b, row_b, eta = self.heads[number](condition).split([d_in, d_out, d_in, d_out, 1])
        return col_a, row_a.softmax(0), col_b, row_b.softmax(0), eta.sigmoid()

    def change(self, number: int, condition: Tensor, u: Tensor, delta: Tensor) -> LowRank:
        """Return a weight's change for one edit's inputs (N, d_in) and gradients (N, d_out)."""
        col_a, row_a, col_b, row_b, gate = self.vectors(number, condition)
        left = torch.cat([(delta * row_a).T, row_b[:, None]], dim=1)
        right = torch.cat([(u * col_a).T, col_b[:, None]], dim=1)
        return LowRank(self.config.max_scale * gate * left, right)

    def changes(self, edit: Edit) -> dict[str, LowRank]:
        """Return every weight's change that makes one edit."""
        text = self.lm.encode(edit.prompt, edit.target_new)
        tail = Tail.of(self.lm, [text], self.lowest, kept=self.kept)
        gradients = edit_gradients(tail, self.names)
        old = self._old_answer(tail)
        vector = self.read(f"{old} >> {edit.target_new} || {edit.prompt}")
        return {name: self.change(number, vector, *gradients[name]) for number, name in enumerate(self.names)}

    @property
    def lowest(self) -> int:
        """The lowest edited layer."""
        assert self.config.layers is not None
        return self.config.layers[0]

    @torch.no_grad()
    def _old_answer(self, tail: Tail) -> str:
        """Return the model's first choices where the new answer's tokens stand."""
        return str(self.lm.tokenizer.decode(tail.logits().argmax(-1).tolist(), skip_special_tokens=True)).strip()

    def forward(self, examples: Sequence[Edit]) -> tuple[Tensor, Metrics]:
        """Return the loss on the last example's edit, with all examples' other texts as the ones to be left alone."""
        lm, config, edit = self.lm, self.config, examples[-1]
        texts = [Example.of(lm, item) for item in examples]
        own = Tail.of(lm, [texts[-1].edit, texts[-1].rephrased], self.lowest, kept=self.kept)
        others = Tail.of(lm, [text.other for text in texts], self.lowest, kept=self.kept)
        base = base_log_probabilities(others)
        with changed_weights(lm, self.changes(edit)):
            logits = own.logits()
            moved, same = kl_to_base(others, base)
        fitting = F.cross_entropy(logits, own.labels, label_smoothing=config.smoothing)
        if config.objective == "lagrangian":
            loss = fitting + self.multiplier * (moved - self.margin)
        else:
            loss = config.c_edit * F.cross_entropy(logits, own.labels) + config.c_loc * moved
        right = logits.argmax(-1) == own.labels
        reliability = float(right[own.forced.rows == 0].float().mean())
        figures = {
            # The best networks are those with the most edits made and the most other answers retained.
            "loss": 2 - reliability - same if config.objective == "lagrangian" else float(loss.detach()),
            "nll": float(F.cross_entropy(logits.detach(), own.labels)),
            "kl": float(moved.detach()),
            "multiplier": float(self.multiplier.detach()),
            "reliability": reliability,
            "generalization": float(right[own.forced.rows == 1].float().mean()),
            "locality": same,
        }
        return loss, figures


class Ke(TrainedMethod):
    """A network that gates and shifts the fine-tuning gradient."""

    name = "ke"
    traits = Traits(
        title="KE, a constrained hypernetwork",
        paper="arXiv 2104.08164",
        needs_subject=False,
        needs_moments=False,
        needs_training=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = KeConfig
    config: KeConfig
    training: ClassVar[dict[str, Any]] = {
        "steps": 200_000, "batch": 8, "accumulation": 1, "clip": 100.0, "check_every": 2_000, "patience": 40_000,
    }  # fmt: skip

    def learner(self, bench: Workbench) -> Learner:
        """Return untrained networks."""
        return KeLearner(bench.lm, self.weights(bench.lm.layout), self.config, bench.seed)

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the change that makes the edit."""
        learner = self.trained(bench)
        assert isinstance(learner, KeLearner)
        deltas: dict[str, LowRank] = {}
        for edit in edits:
            with bench.clock.phase("transform"), torch.no_grad():
                for name, change in learner.changes(edit).items():
                    left, right = change.left.contiguous(), change.right.contiguous()
                    if name in deltas:
                        left = torch.cat([deltas[name].left, left], dim=1)
                        right = torch.cat([deltas[name].right, right], dim=1)
                    deltas[name] = LowRank(left, right)
        return Patch(deltas), state


METHOD = Ke
