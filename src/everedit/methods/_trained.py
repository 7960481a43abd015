"""What methods share that learn to edit before they edit: which weights, the examples' texts, and their checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.gradients import recorded_gradients
from everedit.engine.learner import Learner
from everedit.engine.settings import validated
from everedit.engine.spread import check_layers
from everedit.engine.tail import Tail
from everedit.errors import CacheError, EditError, NotApplicable
from everedit.methods._base import Method, MethodConfig
from everedit.models import LanguageModel
from everedit.models.hooks import changed_output
from everedit.models.layout import Layout
from everedit.models.tokens import Encoded
from everedit.patch import LowRank, load_tensors

__all__ = ["Example", "TrainedConfig", "TrainedMethod", "changed_weights", "edit_gradients", "kl_to_base"]


_NETWORKS = "networks.safetensors"


class TrainedConfig(MethodConfig):
    """Settings that these methods have in common; None means the published value for the family."""

    checkpoint: Path | None = Field(None, description="folder that everedit train has written")
    layers: tuple[int, ...] | None = Field(None, description="edited layers: published, the last three")

    def with_searched(self, layout: Layout) -> Self:
        """Return the config with what the checkpoint was trained with in place of what nobody set."""
        config = super().with_searched(layout)
        file = None if self.checkpoint is None else self.checkpoint / _NETWORKS
        if file is None or not file.exists():
            # It is missed when it is needed, with the name of the method.
            return config
        kept = load_tensors(file)[1].get("settings", {})
        known = set(type(self).model_fields) - self.model_fields_set - {"checkpoint"}
        # Through validation: lists that come from a file are tuples here.
        given = {name: getattr(config, name) for name in type(self).model_fields}
        return validated(type(self), {**given, **{name: kept[name] for name in known if name in kept}}, str(file))

    def resolved(self, layout: Layout) -> Self:
        """Return the config with the layers."""
        config, depth = self.with_searched(layout), layout.n_layers
        layers = config.layers or tuple(range(max(0, depth - 3), depth))
        return config.model_copy(update={"layers": check_layers(layers, depth)})


class TrainedMethod(Method):
    """A method with networks of its own, made by ``everedit train``."""

    config: TrainedConfig
    training: ClassVar[Mapping[str, Any]] = {}
    """The published settings of the training loop: see :class:`everedit.training.TrainConfig`."""

    @abstractmethod
    def learner(self, bench: Workbench) -> Learner:
        """Return untrained networks for this model, drawn with the bench's seed."""

    def check_example(self, bench: Workbench, edit: Edit) -> None:
        """Raise an :class:`everedit.errors.EvereditError` if an edit cannot be a training example."""
        Example.of(bench.lm, edit)

    def layers(self) -> tuple[int, ...]:
        """Return the edited layers."""
        assert self.config.layers is not None
        return self.config.layers

    def weights(self, layout: Layout) -> list[str]:
        """Return the names of all MLP projections of the edited layers."""
        return [
            name for layer in self.layers() for name in (*layout.mlp_in_weights(layer), layout.mlp_out_weight(layer))
        ]

    def work(self, tokens: float) -> float:
        """Return one forward and one backward pass."""
        return 2 * tokens

    def trained(self, bench: Workbench) -> Learner:
        """Return the networks of the checkpoint, read once.

        Raises :class:`EditError` if none is given, :class:`NotApplicable` if it is of another method or model, and
        :class:`CacheError` if it is damaged.
        """
        if self.config.checkpoint is None:
            raise EditError(
                what=f"{self.name} must be trained before it can edit",
                fix=f"everedit train {self.name} --model … --data … --out FOLDER, then --set method.checkpoint=FOLDER",
            )
        folder = self.config.checkpoint
        return bench.once(("checkpoint", self.name, str(folder)), lambda: self._loaded(bench, folder))

    def _loaded(self, bench: Workbench, folder: Path) -> Learner:
        file = folder / _NETWORKS
        if not file.exists():
            raise CacheError(
                what="there is no trained checkpoint",
                where=str(folder),
                fix="give the folder that everedit train wrote",
            )
        tensors, card = load_tensors(file)
        mine = {"method": self.name, "model": bench.lm.fingerprint}
        for part, value in mine.items():
            if card.get(part) != value:
                raise NotApplicable(
                    what=f"this checkpoint is of another {part}: {str(card.get(part))[:40]}",
                    where=str(folder),
                    fix=f"train {self.name} for this model: everedit train {self.name} --model {bench.lm.name} …",
                )
        learner = self.learner(bench)
        try:
            learner.load_state_dict(tensors)
        except RuntimeError as error:
            raise CacheError(
                what=f"the checkpoint does not fit the method's settings: {str(error).splitlines()[-1].strip()}",
                where=str(folder),
                fix="take the settings that it was trained with; they are in its card.json",
            ) from error
        return learner.eval().requires_grad_(False)

    def prepare(self, bench: Workbench) -> None:
        """Read the checkpoint too."""
        super().prepare(bench)
        self.trained(bench)


@dataclass(frozen=True)
class Example:
    """The texts of one training example: the edit, the edit in other words, and something that it is not about."""

    edit: Encoded
    rephrased: Encoded
    other: Encoded

    @classmethod
    def of(cls, lm: LanguageModel, edit: Edit) -> Example:
        """Return an edit's texts; its first probes are taken.

        Raises :class:`EditError` if it has no locality probe; without a rephrasing its own prompt stands in.
        """
        if not edit.locality:
            raise EditError(
                what="the example has no locality probe, and training needs one",
                where=repr(edit.prompt),
                fix="give each training record one: see everedit data validate",
            )
        rephrased = edit.rephrase[0] if edit.rephrase else edit.prompt
        other = edit.locality[0]
        return cls(
            lm.encode(edit.prompt, edit.target_new),
            lm.encode(rephrased, edit.target_new),
            lm.encode(other.prompt, other.answer),
        )


def edit_gradients(tail: Tail, names: Sequence[str], *, tokens: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by weight, inputs u (N, d_in) and gradients delta (N, d_out) of the loss at the outputs, float32.

    The loss is the sum over target tokens by ``tokens``, by default their number; places where u or delta is all zero
    are left out.
    """
    layout = tail.lm.layout
    modules = {name: layout.module_of(name) for name in names}

    def loss() -> Tensor:
        return F.cross_entropy(tail.logits(), tail.labels, reduction="sum") / (tokens or len(tail.labels))

    found = {}
    for name, (inputs, gradients) in recorded_gradients(loss, modules).items():
        u, delta = inputs.reshape(-1, inputs.shape[-1]).float(), gradients.reshape(-1, gradients.shape[-1]).float()
        real = (u != 0).any(1) & (delta != 0).any(1)
        found[name] = u[real], delta[real]
    return found


@contextmanager
def changed_weights(lm: LanguageModel, changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Let low-rank changes be part of the weights while the block runs; gradients flow into their factors."""
    with ExitStack() as stack:
        for name, change in changes.items():

            def added(inputs: Tensor, output: Tensor, change: LowRank = change) -> Tensor:
                return output + ((inputs.float() @ change.right) @ change.left.T).to(output.dtype)

            stack.enter_context(changed_output(lm.layout.module_of(name), added))
        yield


def kl_to_base(tail: Tail, base: Tensor) -> tuple[Tensor, float]:
    """Return KL(p_base || p_now), the mean over all real places of the texts, and the share of these where the first
    choice is the same; ``base`` are the log-probabilities there.
    """
    now = tail.lm.logits(tail.states()[tail.forced.real]).log_softmax(-1)
    same = (now.argmax(-1) == base.argmax(-1)).float().mean()
    return F.kl_div(now, base, reduction="batchmean", log_target=True), float(same)


@torch.no_grad()
def base_log_probabilities(tail: Tail) -> Tensor:
    """Return the log-probabilities (places, vocabulary) of the model as it is, at all real places."""
    return tail.lm.logits(tail.states()[tail.forced.real]).log_softmax(-1)
