"""GRACE: out(h) = v_i if ||h - k_i|| <= eps_i for the nearest key k_i, else f(h), at the prompt's last token.

Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", NeurIPS 2023, arXiv
2211.11031. No weight changes: one MLP's down projection gets a code book. A key is what enters it at the prompt's last
token, its value a trained stand-in for what comes out. A radius grows when a near edit has the same target and is cut
in half when it has another. Labels are compared by their tokens and appended with their keys; the released code
compares a mean of ids and prepends them, so that most decisions there are about the wrong entry (grace.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.beside import LayerMemory
from everedit.engine.state import State
from everedit.engine.tail import Tail
from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._beside import BesideConfig, BesideMethod
from everedit.models.calls import Call
from everedit.models.tokens import Encoded
from everedit.patch import Patch

_MARGIN = 1e-5

Replace = Literal["last", "all", "prompt"]


class GraceConfig(BesideConfig):
    """Settings of GRACE; None means the published value for the family."""

    published_layers: ClassVar[dict[tuple[str, int], int]] = {
        ("gpt2", 48): 35, ("gptj", 28): 25, ("llama", 32): 27, ("llama", 28): 18,
    }  # fmt: skip

    radius: float = Field(1.0, gt=0, description="eps_init, of a new key")
    steps: int = Field(50, ge=1, description="gradient steps on a value")
    lr: float = Field(1.0, gt=0, description="Adam's learning rate")
    stop_loss: float = Field(0.0, ge=0, description="training stops below this loss; as published: never")
    start: Literal["cold", "warm"] = Field(
        "cold", description="a new value is random in [0, 1), or what the layer gives now"
    )
    expand: Literal["coverage", "moving_average"] = Field(
        "coverage", description="a near edit of the same target widens the radius, or also moves the key half-way"
    )
    replace: Replace = Field("last", description="where the value stands in: the prompt's last token, before, or all")
    routing: Literal["prompt", "call"] = Field(
        "prompt", description="call: every forward pass asks anew with its own last token, as in the released code"
    )


@dataclass
class CodeBook(LayerMemory):
    """Keys (N, D), values (N, H), radii (N,) and the targets' tokens (N, longest), -1 behind their ends."""

    layer: int
    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor
    replace: Replace = "last"
    hold: bool = True

    @classmethod
    def of(cls, state: State, config: GraceConfig) -> CodeBook | None:
        """Return the code book of a state; None if there is none yet."""
        if "keys" not in state.tensors or not len(state.tensors["keys"]):
            return None
        assert config.layer is not None
        return cls(config.layer, **state.tensors, replace=config.replace, hold=config.routing == "prompt")

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance to the nearest key and its number, (n,) each, of ``queries`` (n, D)."""
        # Not by way of products: close keys would lose their distance in them.
        exact = torch.cdist(queries.float(), self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        found = exact.min(1)
        return found.values, found.indices

    def chosen(self, queries: Tensor) -> Tensor:
        """Return the entry that answers each of ``queries`` (n, D), -1 for none."""
        distance, entry = self.nearest(queries)
        return torch.where(distance <= self.radii[entry], entry, -1)

    def change(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Put the chosen entries' values into the places that ``replace`` names."""
        rows = torch.arange(len(key), device=key.device)

        def decide() -> Tensor:
            return self.chosen(key[rows, call.last])

        entries = call.decided("grace", decide) if self.hold else decide()
        places = self._places(call)
        places = None if places is None else places & (entries >= 0)[:, None]
        if places is None or not bool(places.any()):
            return value
        stand_in = self.values[entries.clamp_min(0)][:, None].to(value.dtype)
        return torch.where(places[..., None], stand_in, value)

    def _places(self, call: Call) -> Tensor | None:
        if self.replace == "all":
            return call.real
        if self.hold and not call.begins:
            # What is generated behind the prompt meets the value through attention alone, as it did in training.
            return None
        columns = torch.arange(call.real.shape[1], device=call.real.device)
        at_end = columns == call.last[:, None]
        return at_end if self.replace == "last" else (columns < call.last[:, None]) & call.real


class Grace(BesideMethod):
    """A code book around one layer."""

    name = "grace"
    traits = Traits(
        title="GRACE, a code book of keys and values",
        paper="arXiv 2211.11031",
        changes="module",
        needs_subject=False,
        needs_moments=False,
        keeps_state=True,
        writes_mlp_values=False,
    )
    Config = GraceConfig
    config: GraceConfig

    def work(self, tokens: float) -> float:
        """Return a forward and a backward pass of the upper layers for each step, a sixth of the depth."""
        return 2 * self.config.steps * tokens / 6

    def memory(self, bench: Workbench, state: State) -> CodeBook | None:
        """Return the code book."""
        return CodeBook.of(state, self.config)

    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the values that were trained, and the code book with them."""
        written: dict[str, Tensor] = {}
        for number, edit in enumerate(edits):
            text = bench.lm.encode(edit.prompt, edit.target_new)
            tail = Tail.of(bench.lm, [text], self.layer)
            key, output = _at_prompt_end(tail, text)
            with bench.clock.phase("code book"):
                book, entry = self._opened(bench, state, key, text, output)
            with bench.clock.phase("train"):
                trained = self._trained(tail, text, book.values[entry])
            written[f"{self.name}.{number}"] = trained - book.values[entry] if state.tensors else trained
            book.values[entry] = trained
            tensors = {"keys": book.keys, "values": book.values, "radii": book.radii, "labels": book.labels}
            state = State(tensors, {"entries": len(book.keys)})
        return Patch({}, memory=written), state

    def _opened(
        self, bench: Workbench, state: State, key: Tensor, text: Encoded, output: Tensor
    ) -> tuple[CodeBook, int]:
        """Return the code book after the step on keys and radii, and the entry whose value is to be trained."""
        config = self.config
        book = CodeBook.of(state, config)
        label = torch.tensor(text.target_ids, device=key.device)[None]
        if book is None:
            first = (key[None], self._new_value(bench, output, 0)[None], key.new_tensor([config.radius]), label)
            return CodeBook(self.layer, *first), 0
        book = CodeBook(book.layer, book.keys.clone(), book.values.clone(), book.radii.clone(), book.labels)
        distances, entries = book.nearest(key[None])
        distance, near = float(distances), int(entries)
        radius = config.radius
        if distance <= config.radius + float(book.radii[near]):
            if book.labels[near][book.labels[near] >= 0].tolist() == list(text.target_ids):
                book.radii[near] = max(distance, float(book.radii[near]))
                if config.expand == "moving_average":
                    book.keys[near] = (book.keys[near] + key) / 2
                return book, near
            if distance <= 2 * _MARGIN:
                # Two balls around one key cannot be told apart: the newer target takes the entry over.
                width = max(book.labels.shape[1], label.shape[1])
                book.labels = _widened(book.labels, width)
                book.labels[near] = _widened(label, width)[0]
                return book, near
            book.radii[near], radius = distance / 2 - _MARGIN, distance / 2
        value = self._new_value(bench, output, len(book.keys))
        book.keys = torch.cat([book.keys, key[None]])
        book.values = torch.cat([book.values, value[None]])
        book.radii = torch.cat([book.radii, key.new_tensor([radius])])
        width = max(book.labels.shape[1], label.shape[1])
        book.labels = torch.cat([_widened(book.labels, width), _widened(label, width)])
        return book, len(book.keys) - 1

    def _new_value(self, bench: Workbench, output: Tensor, entry: int) -> Tensor:
        if self.config.start == "warm":
            return output.clone()
        random = torch.Generator().manual_seed(bench.seed * 1_000_003 + entry)
        return torch.rand(output.shape, generator=random).to(output.device)

    def _trained(self, tail: Tail, text: Encoded, start: Tensor) -> Tensor:
        """Return the value (H,) after gradient descent on the target's loss."""
        config, end = self.config, text.prompt_end - 1
        value = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([value], lr=config.lr, foreach=False)
        columns = torch.arange(tail.forced.real.shape[1], device=start.device)[None, :, None]
        places = {"last": columns == end, "all": columns >= 0, "prompt": columns < end}[config.replace]

        def change(query: Tensor, key: Tensor, output: Tensor) -> Tensor:
            return torch.where(places, value.to(output.dtype), output)

        with tail.changed(change):
            for _ in range(config.steps):
                loss = tail.loss()
                if float(loss.detach()) < config.stop_loss:
                    break
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        return value.detach()


def _at_prompt_end(tail: Tail, text: Encoded) -> tuple[Tensor, Tensor]:
    """Return the key (D,) and the MLP's output (H,), both float32, at the prompt's last token."""
    found: dict[str, Tensor] = {}

    def read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found["key"], found["value"] = key[0, text.prompt_end - 1].float(), value[0, text.prompt_end - 1].float()
        return value

    with torch.no_grad(), tail.changed(read):
        tail.logits()
    return found["key"], found["value"]


def _widened(labels: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(labels, (0, width - labels.shape[1]), value=-1)


METHOD = Grace
