"""Causal tracing: where in a model a fact is recalled, by putting single clean states back into a corrupted run.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, section 2. Noise on the subject's
embeddings lowers the answer's probability from P to P*; a state restored at token i and layer l brings it to P*(i, l),
and the indirect effect is P*(i, l) - P*. It changes no weights. What it finds says little about which layer edits best
(Hase et al., NeurIPS 2023): choose that on edits that you can check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from everedit.models import LanguageModel
from everedit.models.hooks import capture, changed_output, resumed_after

__all__ = ["KINDS", "Kind", "Trace", "TraceConfig", "trace"]

Kind = Literal["state", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("state", "mlp", "attention")
_TOKENS_A_BATCH = 4096


class TraceConfig(BaseModel):
    """Settings of a trace; the defaults are the released code's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    noise: float | None = Field(
        None, ge=0, description="noise level nu; None: 3 deviations of the subjects' embeddings"
    )
    shape: Literal["gaussian", "uniform"] = Field("gaussian", description="N(0, nu^2), or uniform within +- nu")
    replace: bool = Field(False, description="noise in place of the embedding instead of on top of it")
    samples: int = Field(10, ge=1, description="R, noisy copies; all cells share the same draws")
    window: int = Field(10, ge=1, description="how many blocks' MLP or attention outputs are restored together")
    kinds: tuple[Kind, ...] = Field(
        KINDS, description="what is restored: block outputs, MLP outputs, attention outputs"
    )
    severed: Literal["mlp", "attention"] | None = Field(
        None, description="hold these outputs of later blocks, at the restored token, at their corrupted values"
    )
    seed: int = 0


@dataclass(frozen=True)
class Trace:
    """What a trace found. ``effects[kind]`` (tokens, layers) are indirect effects, probabilities of ``answer``."""

    tokens: tuple[str, ...]
    subject: tuple[int, int]
    answer: str
    clean: float
    corrupted: float
    noise: float
    effects: dict[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "tokens": list(self.tokens),
            "subject": list(self.subject),
            "answer": self.answer,
            "clean": self.clean,
            "corrupted": self.corrupted,
            "noise": self.noise,
            "effects": {kind: [[round(v, 6) for v in row] for row in m.tolist()] for kind, m in self.effects.items()},
        }


@torch.no_grad()
def trace(
    lm: LanguageModel,
    prompt: str,
    subject: str,
    config: TraceConfig,
    *,
    subjects: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Trace the model's own next token behind ``prompt``, whose ``subject`` is corrupted.

    ``subjects`` set the noise level where none is given; with none of them the subject itself does.
    Raises :class:`everedit.errors.TokenError` if the subject is not in the prompt.
    """
    lm.layout.require_decoder_only("causal tracing")
    text = lm.encode(prompt, subject=subject)
    assert text.subject is not None
    run = _Run(lm, text.ids, text.subject, config, _noise_level(lm, config, subjects or [subject]))
    maps: dict[str, Tensor] = {}
    done, total = 0, len(config.kinds) * lm.layout.n_layers
    for kind in config.kinds:
        maps[kind] = effects = torch.zeros(len(text.ids), lm.layout.n_layers)
        for layer in range(lm.layout.n_layers):
            # In a causal model nothing before the subject is corrupted: there is nothing to restore.
            effects[text.subject[0] :, layer] = run.restored(kind, layer) - run.corrupted_chance
            done += 1
            progress(done, total)
    words = tuple(str(lm.tokenizer.decode([token])) for token in text.ids)
    answer = str(lm.tokenizer.decode([run.answer]))
    return Trace(words, text.subject, answer, run.clean_chance, run.corrupted_chance, run.level, maps)


def _noise_level(lm: LanguageModel, config: TraceConfig, subjects: Sequence[str]) -> float:
    if config.noise is not None:
        return config.noise
    embed = lm.model.get_input_embeddings()
    special = set(lm.tokenizer.all_special_ids)
    rows = [[token for token in lm.encode(subject).ids if token not in special] for subject in subjects]
    seen = [embed(torch.tensor(row, device=lm.device)).float() for row in rows if row]
    return 3.0 * float(torch.cat(seen).std())


class _Run:
    """The clean run of one row and the corrupted run of R rows, and every state of both."""

    def __init__(
        self, lm: LanguageModel, ids: Sequence[int], subject: tuple[int, int], config: TraceConfig, level: float
    ) -> None:
        self.lm, self.config, self.level = lm, config, level
        self.ids = torch.tensor([list(ids)], device=lm.device)
        self.subject = subject
        layers = range(lm.layout.n_layers)
        self.modules: dict[tuple[str, int], nn.Module] = {("state", layer): lm.layout.block(layer) for layer in layers}
        self.modules |= {("mlp", layer): lm.layout.mlp_out(layer) for layer in layers}
        self.modules |= {("attention", layer): lm.layout.attention_out(layer) for layer in layers}
        with capture(outputs=self.modules, rows=1) as seen:
            chances = self._chances(1)
        self.clean = {key: value.clone() for key, value in seen.items()}
        self.answer = int(chances[0].argmax())
        self.clean_chance = float(chances[0, self.answer])
        embed = {("embedding", 0): lm.model.get_input_embeddings()}
        with self._corrupted(), capture(outputs={**self.modules, **embed}, rows=config.samples) as seen:
            chances = self._chances(config.samples)
        self.noisy = {key: value.clone() for key, value in seen.items()}
        self.corrupted_chance = float(chances[:, self.answer].mean())

    def _chances(self, rows: int) -> Tensor:
        """Run the prompt and return the next token's distribution, (rows, vocabulary)."""
        ids = self.ids.expand(rows, -1)
        states = self.lm.states(input_ids=ids, attention_mask=torch.ones_like(ids))
        return self.lm.logits(states[:, -1]).softmax(-1)

    @contextmanager
    def _corrupted(self) -> Iterator[None]:
        """Put noise on the subject's embeddings, the same at every call."""
        first, last = self.subject
        embed = self.lm.model.get_input_embeddings()

        def change(_: Tensor, output: Tensor) -> Tensor:
            # Drawn in float64 on the CPU, so that every device sees the same noise.
            generator = torch.Generator().manual_seed(self.config.seed)
            shape = (output.shape[0], last - first, output.shape[-1])
            if self.config.shape == "gaussian":
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            else:
                noise = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
            moved = output.clone()
            kept = 0 if self.config.replace else moved[:, first:last]
            moved[:, first:last] = kept + (self.level * noise).to(output.device, output.dtype)
            return moved

        with changed_output(embed, change):
            yield

    def restored(self, kind: Kind, layer: int) -> Tensor:
        """Return P*(i, layer) for every token i from the subject on, (tokens,)."""
        width = 1 if kind == "state" else self.config.window
        first = max(0, layer - width // 2)
        window = range(first, min(self.lm.layout.n_layers, layer - width // 2 + width))
        places = torch.arange(self.subject[0], self.ids.shape[1], device=self.lm.device)
        step = max(1, _TOKENS_A_BATCH // (self.config.samples * self.ids.shape[1]))
        found = [self._restored_at(part, kind, window) for part in places.split(step)]
        return torch.cat(found).cpu()

    def _restored_at(self, places: Tensor, kind: Kind, window: range) -> Tensor:
        copies, rows = self.config.samples, len(places) * self.config.samples
        at = places.repeat_interleave(copies)
        with ExitStack() as stack:
            if window.start:
                below = [self.lm.layout.block(index) for index in range(window.start)]
                hidden = self.noisy["state", window.start - 1].repeat(len(places), 1, 1)
                as_tuple = self.lm.blocks_return_tuples
                stack.enter_context(resumed_after(below, hidden, as_tuple=as_tuple))
            else:
                stack.enter_context(self._corrupted_for(len(places)))
            for index in window:
                clean = self.clean[kind, index][0][at]
                stack.enter_context(changed_output(self.modules[kind, index], _putting(clean, at)))
            if self.config.severed and kind == "state":
                for index in range(window.stop, self.lm.layout.n_layers):
                    held = self.noisy[self.config.severed, index].repeat(len(places), 1, 1)
                    held = held[torch.arange(rows, device=at.device), at]
                    module = self.modules[self.config.severed, index]
                    stack.enter_context(changed_output(module, _putting(held, at)))
            return self._chances(rows)[:, self.answer].view(len(places), copies).mean(1)

    def _corrupted_for(self, places: int) -> AbstractContextManager[None]:
        """As :meth:`_corrupted`, with the same draws for each of several places."""
        noisy = self.noisy["embedding", 0].repeat(places, 1, 1)
        return changed_output(self.lm.model.get_input_embeddings(), lambda _, output: noisy.to(output.dtype))


def _putting(values: Tensor, at: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a change of a module's output that puts ``values`` (rows, H) at each row's token ``at`` (rows,)."""

    def change(_: Tensor, output: Tensor) -> Tensor:
        # Some families run their MLP on all tokens in a line.
        whole = output.view(len(at), -1, output.shape[-1]).clone()
        whole[torch.arange(len(at), device=at.device), at] = values.to(output.dtype)
        return whole.view_as(output)

    return change
