"""What an export is made from: the unedited model, the net change of its weights, and the record of every fact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.errors import EditError, ModelError, NotApplicable, NumericalError
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import Delta, Patch

__all__ = ["Damage", "FactRecord", "Source"]

Scores = Mapping[str, Mapping[str, "float | None"]]


@dataclass(frozen=True)
class FactRecord:
    """A fact that the model was given: who gave it, when (ISO 8601), from what source, until when it holds, and its
    scores by protocol and metric in the unedited model (``before``) and in the one to be exported (``after``).
    """

    edit: Edit
    id: str = ""
    by: str = ""
    at: str = ""
    source: str = ""
    until: str = ""
    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The record's id, or the edit's own."""
        return self.id or self.edit.id

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain values."""
        given = {"by": self.by, "at": self.at, "source": self.source, "until": self.until}
        edit = self.edit.model_dump(mode="json", exclude_defaults=True)
        return {"id": self.name, "edit": edit, **given, "before": dict(self.before), "after": dict(self.after)}


@dataclass(frozen=True)
class Damage:
    """What editing has cost, measured: mean scores over the facts by protocol and metric, and the perplexity of the
    unedited and of the edited model on ``tokens`` tokens of the text called ``text``; None is what was not measured.
    """

    before: Scores = field(default_factory=dict)
    after: Scores = field(default_factory=dict)
    text: str = ""
    tokens: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None


@dataclass(frozen=True)
class Source:
    """All that an exporter reads.

    ``unedited()`` gives the base model while a block runs. ``change`` is all that editing did to its weights, by
    parameter name. ``beside`` names what stands beside the weights. ``made_by`` says with which method, policy and
    settings the change was made. ``roundings`` is about how many times a weight was rounded to float32 on the way: the
    part of the change that is rounding has full rank, however low the rank of the edits.
    """

    unedited: Callable[[], AbstractContextManager[LanguageModel]]
    change: Patch
    beside: tuple[str, ...] = ()
    facts: Sequence[FactRecord] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)
    damage: Damage | None = None
    roundings: int = 1

    @classmethod
    def of_editor(
        cls,
        editor: Editor,
        facts: Sequence[FactRecord] = (),
        *,
        damage: Damage | None = None,
        roundings: int | None = None,
    ) -> Source:
        """Return the present state of an editor's model as a source.

        It stays what it is if the editor goes on; ``roundings`` is by default one for each fact.
        """
        has_memory = editor.method.memory(editor.bench, editor.state().method) is not None
        return cls(
            editor.unedited,
            editor.net_change(),
            (editor.method.name,) if has_memory else (),
            tuple(facts),
            {
                "method": editor.method.name,
                "method_settings": editor.method.config.model_dump(mode="json"),
                "policy": editor.policy.name,
                "policy_settings": editor.policy.settings,
            },
            damage=damage,
            roundings=max(1, len(facts)) if roundings is None else roundings,
        )

    @classmethod
    def of_patch(cls, lm: LanguageModel, change: Patch, **more: Any) -> Source:
        """Return a model that nobody edits and a change of its weights as a source."""

        @contextmanager
        def unedited() -> Iterator[LanguageModel]:
            yield lm

        return cls(unedited, change, **more)

    def require_weights(self, what: str) -> None:
        """Raise :class:`NotApplicable` unless the weights alone hold the edits, and :class:`EditError` if there are
        none.
        """
        if self.beside:
            raise NotApplicable(
                what=f"{' and '.join(self.beside)} keeps its edits in a memory beside the weights, and {what} holds "
                "weights alone",
                fix="serve this model with Everedit and export its card, or make the edits with a method that changes "
                "weights (everedit methods ls)",
            )
        if not self.change.deltas:
            raise EditError(what=f"no weight has been edited, so {what} would be the base model", fix="make an edit")

    def edited(self, lm: LanguageModel, name: str, delta: Delta | None = None) -> Tensor:
        """Return a weight (d_out, d_in) with ``delta``, or else its change, added: float32, as editing rounds it.

        ``lm`` is the unedited model. Raises :class:`ModelError` if the change is none of this model's, and
        :class:`NumericalError` if the weight would not be finite in the model's dtype.
        """
        base = oriented(owner(lm, name))
        change = (self.change.deltas[name] if delta is None else delta).dense()
        if change.shape != base.shape:
            raise ModelError(
                what=f"the change of '{name}' has shape {tuple(change.shape)}, the weight {tuple(base.shape)}",
                where=lm.name,
                fix="export with the model that was edited",
            )
        weight = (base.double() + change.double().to(base.device)).float()
        if not bool(torch.isfinite(weight.to(base.dtype)).all()):
            raise NumericalError(what="an edited weight is not finite", where=name, fix="undo the last edits")
        return weight

    def provenance(self, lm: LanguageModel) -> dict[str, Any]:
        """Return what was done to what, for ``everedit.json`` and the card; ``lm`` is the unedited model."""
        # Where a folder lies on this machine is nobody else's business.
        name = Path(lm.name).name if Path(lm.name).is_dir() else lm.name
        return {
            "base": {"name": name, "fingerprint": lm.fingerprint, "model_type": lm.model.config.model_type},
            **self.made_by,
            "beside": list(self.beside),
            "facts": [fact.as_dict() for fact in self.facts],
            "damage": None if self.damage is None else asdict(self.damage),
            "weights": {name: self._digest(lm, name) for name in self._in_order(lm)},
        }

    def _in_order(self, lm: LanguageModel) -> list[str]:
        places = {name: place for place, (name, _) in enumerate(lm.model.named_parameters())}
        return sorted(self.change.deltas, key=lambda name: (places.get(name, -1), name))

    def _digest(self, lm: LanguageModel, name: str) -> dict[str, Any]:
        delta, base = self.change.deltas[name], oriented(owner(lm, name))
        edited = self.edited(lm, name, delta).to(base.dtype)
        raw: Any = edited.contiguous().cpu().view(torch.uint8).numpy()
        norm = delta.norm()
        size = float(base.double().norm())
        return {
            "norm": norm,
            "relative_norm": norm / size if size else None,
            "sha256": hashlib.sha256(memoryview(raw).cast("B")).hexdigest(),
        }


def owner(lm: LanguageModel, name: str) -> nn.Module:
    """Return the module that a weight belongs to. Raises :class:`ModelError` if the model has no such weight."""
    try:
        module = lm.layout.module_of(name)
    except AttributeError:
        module = None
    if module is None or not name.endswith(".weight") or not isinstance(getattr(module, "weight", None), Tensor):
        raise ModelError(what=f"the model has no weight '{name}'", where=lm.name, fix="export with the edited model")
    return module
