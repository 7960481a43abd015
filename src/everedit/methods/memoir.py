"""MEMOIR: out = W_0 a + W_m (M * a), with a mask M of k inputs that the prompt's own activations choose.

Wang et al., "MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs", NeurIPS 2025,
arXiv 2506.07899. W_m starts at zero and alone is trained; an edit touches the k columns of its mask, which is stored. A
prompt whose mask shares at least a share ``threshold`` of a stored one is answered with the stored mask, any other by
the model as it was. The mask is TopHash: the k largest entries of the mean activation of the prompt's tokens, less its
mean over irrelevant prompts, moved by a fixed permutation. The released code's weight decay, which makes W_m forget, is
a setting that is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.beside import LayerMemory
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._beside import STARTS, BesideConfig, BesideMethod, Contexts, irrelevant_texts, templated
from everedit.models.calls import Call
from everedit.models.layout import Layout
from everedit.models.tokens import Encoded
from everedit.patch import Patch

# Published widths of the mask are 4096 of 11008 to 16384 inputs; a narrower layer takes LLaMA-3's share of its own.
_PUBLISHED_K, _PUBLISHED_FROM, _SHARE = 4096, 11_008, 4096 / 14_336


class MemoirConfig(BesideConfig):
    """Settings of MEMOIR; None means the published value for the family."""

    published_layers: ClassVar[dict[tuple[str, int], int]] = {("gptj", 28): 21, ("llama", 32): 27}

    k: int | None = Field(None, ge=1, description="inputs in a mask; published 4096, else 2/7 of the layer's inputs")
    threshold: float = Field(0.4, ge=0, description="tau: the least overlap with a stored mask that is an answer")
    steps: int = Field(30, ge=1, description="most gradient steps on an edit")
    lr: float = Field(1.0, gt=0, description="learning rate of plain gradient descent")
    clip: float = Field(1.0, gt=0, description="most that a step's gradient may measure")
    stop_loss: float = Field(0.02, ge=0, description="training stops when the loss is below this and stands still")
    stop_change: float = Field(1e-4, ge=0, description="a smaller change of the loss is standing still")
    weight_decay: float = Field(0.0, ge=0, description="of every column at each step; the released code has 1e-5")
    contexts: Contexts = Field(((6, 5), (11, 5)), description="sampled prefixes: (total tokens, how many)")
    feature: Literal["mean_decentered", "mean", "last"] = Field(
        "mean_decentered",
        description="what is hashed: the prompt's mean, less the background or as it is, or its last token",
    )
    permute: bool = Field(True, description="train other columns than those whose inputs are large")
    irrelevant: str = Field("worldfacts", description="data set of the background's prompts")
    irrelevant_path: str | None = Field(None, description="its file, where it does not ship with Everedit")
    background: int = Field(100, ge=1, description="prompts that the background is the mean of")

    def resolved(self, layout: Layout) -> Self:
        """Return the config with layer and k."""
        config, width = super().resolved(layout), layout.inner_size
        k = config.k or (_PUBLISHED_K if width >= _PUBLISHED_FROM else max(1, round(width * _SHARE)))
        return config.model_copy(update={"k": min(k, width)})


@dataclass
class TopHash:
    """Makes masks: a background (D,) to be taken off and the ``places`` (D,) that the features are moved to."""

    background: Tensor
    places: Tensor
    k: int
    feature: str

    def columns(self, key: Tensor, real: Tensor) -> Tensor:
        """Return each row's k columns, ascending, (rows, k), from inputs (rows, length, D) of its real tokens."""
        weights = real.float()
        if self.feature == "last":
            spots = torch.arange(real.shape[1], device=real.device)
            weights = (spots == (spots * real).argmax(1, keepdim=True)).float()
        mean = torch.einsum("rl,rld->rd", weights, key.float()) / weights.sum(1, keepdim=True).clamp_min(1)
        if self.feature == "mean_decentered":
            mean = mean - self.background
        # A stable order, so that equal features choose the same columns everywhere.
        largest = mean.abs().sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        return self.places[largest].sort(1).values


@dataclass
class ResidualMemory(LayerMemory):
    """W_m (H, D) and the columns (T, k) of the stored masks."""

    layer: int
    hash: TopHash
    weight: Tensor
    columns: Tensor
    threshold: float

    def __post_init__(self) -> None:
        self._masks = _masks(self.columns, self.weight.shape[1])

    def overlaps(self, columns: Tensor) -> Tensor:
        """Return the shares of k that masks (n, k) have in common with the stored ones, (n, T)."""
        return _masks(columns, self.weight.shape[1]) @ self._masks.T / columns.shape[1]

    def chosen(self, key: Tensor, real: Tensor) -> Tensor:
        """Return the stored mask that answers each row, -1 for none."""
        best = self.overlaps(self.hash.columns(key, real)).max(1)
        return torch.where(best.values >= self.threshold, best.indices, -1)

    def change(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add the memory's part to the rows that it answers."""
        entries = call.decided("memoir", lambda: self.chosen(key, call.real))
        answered = entries >= 0
        if not bool(answered.any()):
            return value
        masked = key[answered].float() * self._masks[entries[answered]][:, None]
        added = F.linear(masked, self.weight).to(value.dtype)
        return value.index_put((answered.nonzero()[:, 0],), value[answered] + added)


class Memoir(BesideMethod):
    """A residual memory with a mask for each edit."""

    name = "memoir"
    traits = Traits(
        title="MEMOIR, a residual memory with masks that prompts choose",
        paper="arXiv 2506.07899",
        changes="module",
        needs_subject=False,
        needs_moments=False,
        keeps_state=True,
        writes_mlp_values=False,
    )
    Config = MemoirConfig
    config: MemoirConfig

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the empty prefix and the sampled ones."""
        return bench.contexts(self.config.contexts, STARTS)

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass of the upper layers for each template and step."""
        rows = 1 + sum(count for _, count in self.config.contexts)
        return 2 * self.config.steps * rows * tokens / 6

    def memory(self, bench: Workbench, state: State) -> ResidualMemory | None:
        """Return the residual memory; None before the first edit."""
        tensors = state.tensors
        if not tensors or not len(tensors["columns"]):
            return None
        hasher = self._hash(tensors["background"], tensors["places"])
        return ResidualMemory(self.layer, hasher, tensors["weight"], tensors["columns"].long(), self.config.threshold)

    def _hash(self, background: Tensor, places: Tensor) -> TopHash:
        assert self.config.k is not None
        return TopHash(background, places, self.config.k, self.config.feature)

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return how the edits changed W_m, and the memory after them."""
        tensors = state.tensors or self._empty(bench)
        weight, columns = tensors["weight"], tensors["columns"]
        hasher = self._hash(tensors["background"], tensors["places"])
        for edit in edits:
            texts = templated(bench, edit, self.config.contexts)
            with bench.clock.phase("train"):
                tail = Tail.of(bench.lm, texts, self.layer)
                own = hasher.columns(*_prompt_keys(tail, texts[0]))[0]
                weight = self._trained(tail, weight, own)
            if not bool((columns.long() == own).all(1).any()):
                columns = torch.cat([columns, own.to(columns.dtype)[None]])
        change = weight - tensors["weight"]
        fresh = State({**tensors, "weight": weight, "columns": columns}, {"masks": len(columns)})
        return Patch({}, memory={self.name: change}), fresh

    def _empty(self, bench: Workbench) -> dict[str, Tensor]:
        """Return the memory before its first edit, with the background measured and the permutation drawn."""
        layout, config, device = bench.lm.layout, self.config, bench.lm.device
        width = layout.inner_size
        places = torch.arange(width)
        if config.permute:
            places = torch.randperm(width, generator=torch.Generator().manual_seed(bench.seed))
        texts = irrelevant_texts(bench, config.irrelevant, config.irrelevant_path, answers=False)[: config.background]
        return {
            "weight": torch.zeros(layout.hidden_size, width, device=device),
            "columns": torch.zeros(0, config.k or 1, dtype=torch.int32, device=device),
            "places": places.to(device),
            "background": _background(bench, self.layer, texts),
        }

    def _trained(self, tail: Tail, weight: Tensor, columns: Tensor) -> Tensor:
        """Return W_m with the mask's columns (H, k) trained on the target."""
        config = self.config
        part = weight[:, columns].clone().requires_grad_()
        before = float("inf")

        def change(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return value + F.linear(key[..., columns].float(), part).to(value.dtype)

        kept = 1.0
        with tail.changed(change):
            for _ in range(config.steps):
                loss = tail.loss()
                now = float(loss.detach())
                if now <= config.stop_loss and abs(before - now) <= config.stop_change:
                    break
                before = now
                (gradient,) = torch.autograd.grad(loss, [part])
                scale = min(1.0, config.clip / (float(gradient.norm()) + 1e-6))
                shrink = 1 - config.lr * config.weight_decay
                part = (part.detach() * shrink - config.lr * scale * gradient).requires_grad_()
                kept *= shrink
        fresh = weight * kept
        fresh[:, columns] = part.detach()
        return fresh


def _masks(columns: Tensor, width: int) -> Tensor:
    return torch.zeros(len(columns), width, device=columns.device).scatter(1, columns, 1.0)


def _prompt_keys(tail: Tail, text: Encoded) -> tuple[Tensor, Tensor]:
    """Return the first row's inputs (1, P, D) of the memory on the bare prompt, and that all of them are real."""
    inputs = tail.lm.inputs_of({"key": tail.lm.layout.mlp_out(tail.layer)}, tail.lm.pad([text.ids[: text.prompt_end]]))
    key = inputs["key"].view(1, text.prompt_end, -1)
    return key, torch.ones(1, text.prompt_end, dtype=torch.bool, device=key.device)


def _background(bench: Workbench, layer: int, texts: Sequence[str]) -> Tensor:
    """Return the mean over texts of each one's mean input (D,)."""
    lm = bench.lm
    means = []
    for text in texts:
        keys = lm.inputs_of({"key": lm.layout.mlp_out(layer)}, lm.pad([lm.encode(text).ids]))["key"]
        means.append(keys.reshape(-1, lm.layout.inner_size).float().mean(0))
    return torch.stack(means).mean(0)


METHOD = Memoir
