"""LoRA: W <- W + (alpha / r) B A, with the low-rank factors A and B trained by gradient descent, through peft.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, with the settings that
EasyEdit uses for editing: rank 8 on the attention's query and value projections of every layer, a fixed number of
steps on prompt and target with the loss on the target alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import EvereditError, NotApplicable, NumericalError
from everedit.methods._base import SMOLLM2_135M, Method, MethodConfig, Searched, Traits
from everedit.models import LanguageModel
from everedit.models.layout import Layout
from everedit.patch import LowRank, Patch

# Published numbers of steps, by family and number of layers.
_STEPS = {("gpt2", 48): 30, ("gptj", 28): 50, ("llama", 32): 70}


# Where peft has no usual choice.
_OWN = {"phi3": ["qkv_proj"]}


class LoraConfig(MethodConfig):
    """Settings of LoRA; None means the published value for the family."""

    searched: ClassVar[Searched] = {SMOLLM2_135M: {"steps": 20, "lr": 5e-4}}

    rank: int = Field(8, ge=1, description="r")
    alpha: float = Field(32.0, gt=0, description="alpha; the update is scaled by alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in front of A while training")
    modules: tuple[str, ...] | None = Field(None, description="names of the modules; None: peft's for the model type")
    steps: int | None = Field(None, ge=1, description="gradient steps")
    lr: float = Field(5e-3, gt=0, description="Adam's learning rate")
    depth: int | None = Field(None, description="number of layers; the model's")

    def resolved(self, layout: Layout) -> LoraConfig:
        """Return the config with the number of steps."""
        config = self.with_searched(layout)
        steps = config.steps or _STEPS.get((layout.family.name, layout.n_layers), 60)
        return config.model_copy(update={"steps": steps, "depth": layout.n_layers})


class Lora(Method):
    """Low-rank factors on the attention of every layer, merged into its weights."""

    name = "lora"
    traits = Traits(
        title="LoRA, trained low-rank factors (peft)",
        paper="arXiv 2106.09685",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        writes_mlp_values=False,
    )
    Config = LoraConfig
    config: LoraConfig

    def layers(self) -> tuple[int, ...]:
        """Return all layers."""
        assert self.config.depth is not None
        return tuple(range(self.config.depth))

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass for each step."""
        return 2 * (self.config.steps or 0) * tokens

    def weights(self, layout: Layout) -> list[str]:
        """Return the names of the weights that get factors."""
        wanted = self._modules(layout)
        return [f"{name}.weight" for name, _ in layout.model.named_modules() if name.rpartition(".")[2] in wanted]

    def _modules(self, layout: Layout) -> tuple[str, ...]:
        if self.config.modules is not None:
            return self.config.modules
        mapping = _OWN | _peft().utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        kind = layout.model.config.model_type
        if kind not in mapping:
            raise NotApplicable(
                what=f"peft knows no usual modules for model_type '{kind}'",
                fix="name them: method.modules=[q_proj, v_proj]",
            )
        return tuple(mapping[kind])

    def check(self, layout: Layout) -> None:
        """Raise :class:`NotApplicable` too if the modules are not known or not there."""
        super().check(layout)
        if not self.weights(layout):
            raise NotApplicable(
                what=f"the model has no modules called {' or '.join(self._modules(layout))}",
                fix="see everedit models inspect for its modules, and set method.modules",
            )

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the trained factors as changes of the weights; the adapter is taken off again."""
        peft, lm = _peft(), bench.lm
        settings = peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=list(self._modules(lm.layout)),
            bias="none",
            task_type="CAUSAL_LM",
        )
        originals = {name: lm.layout.module_of(name) for name in self.weights(lm.layout)}
        with bench.clock.phase("train"), _randomness(bench.seed), warnings.catch_warnings():
            # peft says on its own that it treats GPT-2's Conv1D rightly.
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(settings, lm.model)
            try:
                layers = {f"{name}.weight": part for name, part in lm.model.named_modules() if hasattr(part, "lora_A")}
                self._train(lm, edits, layers)
                deltas = {name: _factors(layer) for name, layer in layers.items()}
            finally:
                _restore(lm.model, originals)
        return Patch(deltas), state

    def _train(self, lm: LanguageModel, edits: Sequence[Edit], layers: dict[str, nn.Module]) -> None:
        assert self.config.steps is not None
        texts = [lm.encode(edit.prompt, edit.target_new) for edit in edits]
        batch = lm.pad([text.ids[:-1] for text in texts])
        places = [(row, at - 1) for row, text in enumerate(texts) for at in range(*text.target)]
        rows, columns = (torch.tensor(part, device=lm.device) for part in zip(*places, strict=True))
        labels = torch.tensor([token for text in texts for token in text.target_ids], device=lm.device)
        factors = [weight for layer in layers.values() for name, weight in layer.named_parameters() if "lora_" in name]
        optimiser = torch.optim.Adam(factors, lr=self.config.lr)
        for layer in layers.values():
            layer.train()
        for _ in range(self.config.steps):
            with torch.enable_grad():
                loss = F.cross_entropy(lm.logits(lm.states(**batch.inputs())[rows, columns]), labels)
                gradients = torch.autograd.grad(loss, factors)
            if not bool(torch.isfinite(loss.detach())):
                raise NumericalError(what="training met a loss that is not finite", fix="lower the learning rate (lr)")
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient
            optimiser.step()


@contextmanager
def _randomness(seed: int) -> Iterator[None]:
    """Lend torch's generator, which initial factors and dropout come from, a state of our own while the block runs."""
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        yield


def _factors(layer: Any) -> LowRank:
    scale = float(layer.scaling["default"])
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return LowRank((scale * b).float().clone(), a.T.float().clone().contiguous())


def _restore(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Put the modules back that stood where the adapter's now stand; they are the same objects, untouched."""
    for name, module in originals.items():
        path, _, attribute = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(path), attribute, module)
        module.requires_grad_(False).eval()
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in model.__dict__:
            delattr(model, attribute)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise EvereditError(what="lora needs the library peft", fix="pip install 'everedit[lora]'") from error
    return peft


METHOD = Lora
