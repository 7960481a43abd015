"""What every editing method is: traits, a config, and ``fit``, from edits and state to a patch and new state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from typing_extensions import Self

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.beside import Memory
from everedit.engine.downdate import Forgotten
from everedit.engine.keys import prompt_keys, subject_keys
from everedit.engine.rows import prompt_rows
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.models.layout import Layout
from everedit.patch import Patch

__all__ = ["GPT_LIKE", "SMOLLM2_135M", "Method", "MethodConfig", "Searched", "Traits"]

GPT_LIKE = ("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt")
"""Families whose published settings of the value optimisation are those of the first papers."""

Size = tuple[str, int, int]
Searched = dict[Size, dict[str, Any]]
"""Settings by family, number of layers and hidden size."""
SMOLLM2_135M: Size = ("llama", 30, 576)


@dataclass(frozen=True)
class Traits:
    """What a method does and needs, for people, for ``--json`` and for checks before anything is computed."""

    title: str
    paper: str
    changes: str = "weights"
    needs_subject: bool = True
    needs_moments: bool = True
    needs_training: bool = False
    solves_batches: bool = False
    solves_values: bool = False
    keeps_state: bool = False
    chooses_layer: bool = False
    encoder_decoder: bool = False
    writes_mlp_values: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the traits as plain values."""
        return asdict(self)


class MethodConfig(BaseModel):
    """Base of all configs: immutable, and an unknown key is an error. A field that is None is resolved by
    :meth:`resolved` to the published value for the model at hand, or to a fraction of its depth.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    searched: ClassVar[Searched] = {}
    """Settings found by search for models too small for any published one (docs/results/settings.md)."""

    def resolved(self, layout: Layout) -> MethodConfig:
        """Return the config with every open choice made for this model."""
        return self.with_searched(layout)

    def with_searched(self, layout: Layout) -> Self:
        """Return the config with what was searched for this model in place of what nobody set."""
        found = self.searched.get((layout.family.name, layout.n_layers, layout.hidden_size), {})
        return self.model_copy(update={name: found[name] for name in found if name not in self.model_fields_set})


class Method(ABC):
    """A way to turn edits into a patch. ``fit`` leaves the model as it found it; attaching is the editor's job."""

    name: ClassVar[str]
    traits: ClassVar[Traits]
    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    def check(self, layout: Layout) -> None:
        """Raise :class:`everedit.errors.NotApplicable` if the method cannot work on this model."""
        if not self.traits.encoder_decoder:
            layout.require_decoder_only(self.name)
        if self.traits.writes_mlp_values:
            layout.require_mlp_in_residual(self.name)

    def prefixes(self, bench: Workbench) -> list[str]:
        """Return the texts behind which an edit's prompt is read, the empty one first."""
        return [""]

    def check_edit(self, bench: Workbench, edit: Edit) -> None:
        """Raise an error if the edit lacks the subject that the method needs, or the model's context is too short."""
        bench.lm.encode(edit.prompt, edit.target_new)
        if self.traits.needs_subject:
            prompt_rows(bench.lm, edit, self.prefixes(bench), target=True)

    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Return the layers whose weights change."""

    def weights(self, layout: Layout) -> list[str]:
        """Return the names of the weights that may change."""
        return [layout.mlp_out_weight(layer) for layer in self.layers()]

    def moment_layers(self) -> tuple[int, ...]:
        """Return the layers whose second moments are needed."""
        return self.layers() if self.traits.needs_moments else ()

    def prepare(self, bench: Workbench) -> None:
        """Gather what comes from the unedited model: contexts, and the second moments of all layers in one pass.

        Called once, before the first edit.
        """
        self.prefixes(bench)
        with bench.clock.phase("statistics"):
            bench.moments.get(self.moment_layers())

    def work(self, tokens: float) -> float:
        """Return about how many tokens run forward or backward through the whole model for an edit of ``tokens`` of
        them, beside a value optimisation: what a plan is made of.
        """
        return 0.0

    def targets(self, bench: Workbench, edits: Sequence[Edit], prefixes: Sequence[str] | None = None) -> list[Target]:
        """Return the value targets of ``edits`` on the model as it is, optimised together; [] if it has none.

        They hold behind ``prefixes``, by default the method's own.
        """
        return []

    def values_depend_on(self, bench: Workbench) -> dict[str, Any]:
        """Return JSON-like values of all that :meth:`targets` depends on beside the model and the edits: methods that
        agree in it find the same.
        """
        return {"method": self.name, "settings": self.config.model_dump(mode="json")}

    def memory(self, bench: Workbench, state: State) -> Memory | None:
        """Return what stands beside the model's weights in a state; None for methods that change the weights."""
        return None

    def going_back(self, patch: Patch) -> Method:
        """Return the method that makes the edit of ``patch`` again with another target: itself, if nothing in it was
        chosen for that edit.
        """
        return self

    def addresses(self, bench: Workbench, edits: Sequence[Edit]) -> Tensor:
        """Return where each edit is written, (n, d): those of edits that would overwrite each other are close.

        Here it is what enters the down projection in the middle of the method's layers, at the subject's last token
        or, for methods that ask for no subject, at the prompt's.
        """
        layers = self.layers()
        layer = layers[len(layers) // 2]
        if self.traits.needs_subject:
            return subject_keys(bench.lm, edits, [""], layer)[:, 0]
        return prompt_keys(bench.lm, [edit.prompt for edit in edits], layer)

    def forget(self, bench: Workbench, forgotten: Forgotten, state: State) -> tuple[Patch, State] | None:
        """Return the change that takes one step out of the stream, exactly, and the state without it; None if the
        method's algebra does not allow it, and what came later must be made again.
        """
        return None

    @abstractmethod
    def fit(
        self, bench: Workbench, edits: Sequence[Edit], state: State, targets: Sequence[Target] | None = None
    ) -> tuple[Patch, State]:
        """Return the patch that makes ``edits`` together, and the state after it.

        ``targets`` are those of :meth:`targets` if they are known already.
        """
