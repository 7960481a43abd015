"""KN: v_i <- v_i - lambda1 (||v_i|| / ||e_old||) e_old + lambda2 (||v_i|| / ||e_new||) e_new for a fact's neurons i.

Dai et al., "Knowledge Neurons in Pretrained Transformers", ACL 2022, arXiv 2104.08696. Integrated gradients of the
present answer's probability score every neuron of every MLP at the prompt's last token; those above a share of the
largest score, in most of a fact's wordings, are its knowledge neurons, and v_i is neuron i's column of the down
projection. Neurons are taken behind the nonlinearity and twenty steps are integrated, as in the paper; EasyEdit takes
them before it and, for most models, integrates a single step at zero activation (kn.md).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.attribution import attributions
from everedit.engine.bench import Workbench
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import EditError
from everedit.methods._base import SMOLLM2_135M, Method, MethodConfig, Searched, Traits
from everedit.models import LanguageModel
from everedit.models.layout import Layout, oriented
from everedit.patch import LowRank, Patch

Neuron = tuple[int, int]


class KnConfig(MethodConfig):
    """Settings of KN, those of the paper's own code."""

    searched: ClassVar[Searched] = {SMOLLM2_135M: {"add": 2.0}}

    steps: int = Field(20, ge=1, description="m, steps of the integral")
    threshold: float = Field(0.2, gt=0, le=1, description="t, share of a wording's largest score that a neuron needs")
    share: float = Field(0.7, ge=0, le=1, description="p, share of the wordings in which it must be found")
    wordings: int = Field(3, ge=1, description="with fewer wordings than this a neuron must be in all of them")
    most: int = Field(20, ge=1, description="most neurons changed, the highest scores first")
    remove: float = Field(1.0, ge=0, description="lambda1, how much of the old answer's embedding is taken out")
    add: float = Field(8.0, ge=0, description="lambda2, how much of the new answer's embedding is put in")
    embedding: Literal["input", "output"] = Field(
        "output", description="which embedding, where they differ: the output's lies in the residual stream's space"
    )

    signed: bool | None = Field(
        None,
        description="move a neuron's vector against the answer's direction where its activation is negative; None: in "
        "gated MLPs, whose activations have either sign and which the paper does not treat",
    )
    depth: int | None = Field(None, description="number of layers; the model's")

    def resolved(self, layout: Layout) -> KnConfig:
        """Return the config with the model's number of layers, any of which may change, and the sign's treatment."""
        config = self.with_searched(layout)
        gated = sum(layout.input_width(name) for name in layout.mlp_in_names) > layout.inner_size
        signed = gated if config.signed is None else config.signed
        return config.model_copy(update={"depth": layout.n_layers, "signed": signed})


class Kn(Method):
    """A few neurons' value vectors, moved from one answer's embedding to another's."""

    name = "kn"
    traits = Traits(
        title="KN, knowledge neurons",
        paper="arXiv 2104.08696",
        needs_subject=False,
        needs_moments=False,
        chooses_layer=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = KnConfig
    config: KnConfig

    def layers(self) -> tuple[int, ...]:
        """Return all layers: which of them change is found for each edit."""
        assert self.config.depth is not None
        return tuple(range(self.config.depth))

    def work(self, tokens: float) -> float:
        """Return single tokens for every layer and step, forward and backward through half of the model each."""
        return tokens + len(self.layers()) * self.config.steps

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the change of the fact's neurons; which they are is in the patch's ``info``."""
        if len(edits) != 1:
            raise EditError(what="kn makes one edit at a time", fix="give edits one by one")
        edit, lm = edits[0], bench.lm
        with bench.clock.phase("attribution"):
            old = self._present_answer(lm, edit)
            neurons, activations = self.neurons(lm, [edit.prompt, *edit.rephrase], old)
        old_vector = self._embedding(lm, old)
        new_vector = self._embedding(lm, _first(lm, edit.prompt, edit.target_new))
        step = self.config.add * new_vector / new_vector.norm() - self.config.remove * old_vector / old_vector.norm()
        deltas = {}
        for layer in sorted({layer for layer, _ in neurons}):
            weight = oriented(lm.layout.mlp_out(layer)).float()
            chosen = [index for at, index in neurons if at == layer]
            columns = torch.zeros(weight.shape[1], len(chosen), device=weight.device)
            columns[chosen, torch.arange(len(chosen))] = 1.0
            sizes = weight[:, chosen].norm(dim=0)
            if self.config.signed:
                sizes = sizes * activations[layer, chosen].sign()
            deltas[lm.layout.mlp_out_weight(layer)] = LowRank(step[:, None] * sizes, columns)
        return Patch(deltas, {"neurons": [list(neuron) for neuron in neurons], "answer": old}), state

    def neurons(self, lm: LanguageModel, prompts: Sequence[str], answer: int) -> tuple[list[Neuron], Tensor]:
        """Return (layer, index) of the neurons that the token ``answer`` depends on behind most of ``prompts``, and
        all activations (layers, D) behind the first of them.
        """
        counts: Counter[Neuron] = Counter()
        scores: dict[Neuron, float] = defaultdict(float)
        readings = [attributions(lm, lm.encode(prompt).ids, answer, self.config.steps) for prompt in prompts]
        chosen = [
            ((found >= self.config.threshold * found.max()) & (found > 0)).nonzero().tolist() for found, _ in readings
        ]
        for (found, _), above in zip(readings, chosen, strict=True):
            for layer, index in above:
                counts[layer, index] += 1
                scores[layer, index] += float(found[layer, index])
        needed = self.config.share * len(prompts) if len(prompts) >= self.config.wordings else len(prompts)
        kept = [neuron for neuron, count in counts.items() if count >= needed]
        # Where no neuron serves most wordings, those of the edit's own prompt are at least about the fact.
        kept = kept or [(layer, index) for layer, index in chosen[0]]
        if not kept:
            raise EditError(
                what="no neuron bears on the present answer, so there is none to change",
                where=prompts[0],
                fix='give the "ground_truth" that the model says behind this prompt',
            )
        return sorted(sorted(kept, key=lambda neuron: -scores[neuron])[: self.config.most]), readings[0][1]

    def _present_answer(self, lm: LanguageModel, edit: Edit) -> int:
        """Return the first token of the known true answer, else of what the model says now."""
        if edit.ground_truth:
            return _first(lm, edit.prompt, edit.ground_truth)
        return lm.generate_ids([lm.encode(edit.prompt).ids], max_new_tokens=1)[0][0]

    def _embedding(self, lm: LanguageModel, token: int) -> Tensor:
        inputs, outputs = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
        weight = (outputs if self.config.embedding == "output" else inputs).weight
        assert isinstance(weight, Tensor)
        return weight[token].float()


def _first(lm: LanguageModel, prompt: str, answer: str) -> int:
    return lm.encode(prompt, answer).target_ids[0]


METHOD = Kn
