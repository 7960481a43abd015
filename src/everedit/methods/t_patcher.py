"""T-Patcher: out = FFN(q) + act(q k^T + b) v, a neuron for each answer token that the model gets wrong.

Huang et al., "Transformer-Patcher: One Mistake Worth One Neuron", ICLR 2023, arXiv 2301.09785. A neuron's key, bias and
value are trained on L_edit + c_a S_5(beta_a - a(q_e)) + c_m [S_n(a(q_m) - beta) + S_n(a(q_m) - a(q_e) + gamma)], where
a = q k^T + b, S_n is the mean of the n largest exp(.), q_e is the neuron's own place and q_m are places in other texts:
it fires on its mistake and nowhere else. Earlier neurons stay as they are. A gated MLP gets ungated neurons beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.slots import Slots
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._beside import BesideConfig, BesideMethod, irrelevant_texts
from everedit.models import LanguageModel
from everedit.patch import Patch

_LARGEST_EXPONENT = 30.0


class TPatcherConfig(BesideConfig):
    """Settings of T-Patcher: those published for generation (zsRE)."""

    depth: ClassVar[float] = 1.0

    most: int = Field(5, ge=1, description="most neurons for an edit")
    steps: int = Field(2000, ge=1, description="most gradient steps on an edit")
    first_check: int = Field(100, ge=1, description="step of the first validation")
    check_every: int = Field(25, ge=1, description="steps between validations")
    patience: float = Field(1e-3, ge=0, description="training stops when the validation loss falls by less than this")
    lr: float = Field(1e-2, gt=0, description="Adam's learning rate; halved when the edit's loss stands still")
    weight_decay: float = Field(0.01, ge=0, description="Adam's weight decay")
    clip: float = Field(5.0, gt=0, description="most that a step's gradient may measure")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing of the edit's loss")
    fire: float = Field(1.0, ge=0, description="c_a, weight of firing on the edit")
    silence: float = Field(10.0, ge=0, description="c_m, weight of silence elsewhere")
    beta: float = Field(-3.0, description="beta, what pre-activations elsewhere shall stay below")
    gamma: float = Field(3.0, description="gamma, and how far below the edit's")
    largest: int = Field(1000, ge=1, description="how many of the largest terms elsewhere count")
    value_scale: float = Field(10.0, gt=0, description="size of a new neuron's random value")
    memory: int = Field(20_000, ge=1, description="most places in other texts, a tenth of which are for validation")
    irrelevant: str = Field("worldfacts", description="data set of these texts")
    irrelevant_path: str | None = Field(None, description="its file, where it does not ship with Everedit")


@dataclass
class _Neurons:
    """The neurons in training: keys and two factors of the values (n, H), biases (n,)."""

    keys: Tensor
    biases: Tensor
    directions: Tensor
    sizes: Tensor

    @classmethod
    def at(cls, queries: Tensor, size: float, seed: int) -> _Neurons:
        """Return neurons that read 1 at their own ``queries`` (n, H), with random values."""
        keys = queries / queries.pow(2).sum(1, keepdim=True)
        random = torch.randn(queries.shape, generator=torch.Generator().manual_seed(seed)).to(queries.device)
        parts = keys, keys.new_zeros(len(keys)), random, torch.full_like(random, size)
        return cls(*(part.clone().requires_grad_() for part in parts))

    def parts(self) -> list[Tensor]:
        return [self.keys, self.biases, self.directions, self.sizes]

    def read(self, queries: Tensor) -> Tensor:
        return F.linear(queries, self.keys, self.biases)

    def added(self, queries: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        return act(self.read(queries.float())) @ (self.directions * self.sizes)

    def finished(self) -> dict[str, Tensor]:
        return {
            "keys": self.keys.detach().clone(),
            "biases": self.biases.detach().clone(),
            "values": (self.directions * self.sizes).detach(),
        }


class TPatcher(BesideMethod):
    """Neurons beside the last MLP, one for each mistake."""

    name = "t-patcher"
    traits = Traits(
        title="T-Patcher, a neuron for each mistake",
        paper="arXiv 2301.09785",
        changes="module",
        needs_subject=False,
        needs_moments=False,
        keeps_state=True,
        writes_mlp_values=False,
    )
    Config = TPatcherConfig
    config: TPatcherConfig

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass of one layer and the head for each step of a usual edit."""
        return 2 * self.config.first_check * tokens / 6

    def memory(self, bench: Workbench, state: State) -> Slots | None:
        """Return the neurons; None before the first."""
        if not len(state.tensors.get("keys", ())):
            return None
        parts = {name: state.tensors[name] for name in ("keys", "values", "biases")}
        return Slots(self.layer, bench.lm.layout.activation, **parts)

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the new neurons, and all of them with the places where they shall be silent."""
        tensors = dict(state.tensors)
        failed = int(state.values.get("failed", 0))
        if "elsewhere" not in tensors:
            with bench.clock.phase("memory"):
                tensors |= self._elsewhere(bench)
        start = len(tensors.get("keys", ()))
        for edit in edits:
            with bench.clock.phase("train"):
                taught = self._taught(bench, edit, tensors)
            failed += int(taught is not None and not taught[1])
            fresh = {} if taught is None else taught[0]
            for name in fresh:
                tensors[name] = torch.cat([tensors[name], fresh[name]]) if name in tensors else fresh[name]
        if "values" not in tensors:
            return Patch({}), State(tensors, {"neurons": 0, "failed": failed})
        counts = {"neurons": len(tensors["keys"]), "failed": failed}
        return Patch({}, memory={self.name: tensors["values"][start:]}), State(tensors, counts)

    def _elsewhere(self, bench: Workbench) -> dict[str, Tensor]:
        """Return inputs of the MLP at places in other texts: for training, and one in ten for validation."""
        texts = irrelevant_texts(bench, self.config.irrelevant, self.config.irrelevant_path)
        found: list[Tensor] = []
        for start in range(0, len(texts), 32):
            rows = [bench.lm.encode(text).ids for text in texts[start : start + 32]]
            found.append(_queries(bench.lm, rows, self.layer))
            if sum(map(len, found)) >= self.config.memory:
                break
        queries = torch.cat(found)[: self.config.memory]
        held_out = torch.arange(len(queries), device=queries.device) % 10 == 9
        return {"elsewhere": queries[~held_out], "held_out": queries[held_out]}

    def _taught(
        self, bench: Workbench, edit: Edit, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], bool] | None:
        """Return the edit's neurons with the places that later ones shall leave alone, and whether it took; None if the
        model is right already.
        """
        lm, config = bench.lm, self.config
        text = lm.encode(edit.prompt, edit.target_new)
        tail = Tail.of(lm, [text], self.layer)
        queries = _queries(lm, [text.ids[:-1]], self.layer)
        earlier, neurons = self.memory(bench, State(tensors)), None

        def change(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            value = value if earlier is None else value + earlier.added(query).to(value.dtype)
            return value if neurons is None else value + neurons.added(query, lm.layout.activation).to(value.dtype)

        with torch.no_grad(), tail.changed(change):
            wrong = (tail.logits().argmax(-1) != tail.labels).nonzero()[:, 0]
        if not len(wrong):
            return None
        own = queries[tail.forced.columns[wrong[: config.most]]]
        neurons = _Neurons.at(own, config.value_scale, bench.seed * 1_000_003 + len(tensors.get("keys", ())))
        with tail.changed(change):
            best, took = self._trained(tail, neurons, own, tensors)
        return {**best, "elsewhere": queries}, took

    def _trained(
        self, tail: Tail, neurons: _Neurons, own: Tensor, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], bool]:
        """Return the neurons with the least validation loss among those that make the edit; the last ones if none."""
        config = self.config
        optimiser = torch.optim.Adam(neurons.parts(), lr=config.lr, weight_decay=config.weight_decay, foreach=False)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=1, threshold=0.05)
        best, lowest = None, float("inf")
        for step in range(1, config.steps + 1):
            logits = tail.logits()
            fitting = F.cross_entropy(logits, tail.labels, label_smoothing=config.smoothing)
            loss = fitting + self.margins(neurons, own, tensors["elsewhere"])
            tail.require_finite(loss)
            if step >= config.first_check and (step - config.first_check) % config.check_every == 0:
                plateau.step(float(fitting.detach()))
                if bool((logits.argmax(-1) == tail.labels).all()):
                    with torch.no_grad():
                        validation = float(self.silence(neurons, own, tensors["held_out"]))
                    if best is not None and validation > lowest - config.patience:
                        break
                    best, lowest = neurons.finished(), validation
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(neurons.parts(), config.clip)
            optimiser.step()
        return (neurons.finished(), False) if best is None else (best, True)

    def margins(self, neurons: _Neurons, own: Tensor, elsewhere: Tensor) -> Tensor:
        """Return c_a L_act + c_m (L_mem1 + L_mem2)."""
        firing = -neurons.read(own).diagonal()
        return self.config.fire * _largest(firing, 5) + self.config.silence * self.silence(neurons, own, elsewhere)

    def silence(self, neurons: _Neurons, own: Tensor, elsewhere: Tensor) -> Tensor:
        """Return L_mem1 + L_mem2."""
        there, here = neurons.read(elsewhere), neurons.read(own).diagonal()
        margin = there - here + self.config.gamma
        return _largest(there - self.config.beta, self.config.largest) + _largest(margin, self.config.largest)


def _largest(terms: Tensor, count: int) -> Tensor:
    """Return the mean of the ``count`` largest exp(.)."""
    flat = terms.flatten()
    return flat.topk(min(count, len(flat))).values.clamp_max(_LARGEST_EXPONENT).exp().mean()


@torch.no_grad()
def _queries(lm: LanguageModel, rows: Sequence[Sequence[int]], layer: int) -> Tensor:
    """Return the MLP's inputs (tokens, H) at every token of some rows."""
    batch = lm.pad(rows)
    inputs = lm.inputs_of({"query": lm.layout.mlp_in(layer)}, batch)["query"]
    return inputs.view(*batch.ids.shape, -1)[batch.mask.bool()].float()


METHOD = TPatcher
