"""The networks of MEND and MALMEN as the paper writes them, row by row, and editors that use networks of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.hyper import GradientTransform
from everedit.engine.learner import Learner
from everedit.methods._trained import TrainedMethod
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.training.folder import TrainFolder
from tests.support.editing import make_editor
from tests.support.gradients import Pairs, as_stored, target_losses, whole_logits
from tests.support.training import TRAINED


def untrained(lm: LanguageModel, method: str, **settings: Any) -> Any:
    """Return a method's networks as they come."""
    editor = Editor(lm, method, method_settings={**TRAINED[method], **settings})
    assert isinstance(editor.method, TrainedMethod)
    return editor.method.learner(editor.bench).eval()


def shaken(learner: Any, size: float = 0.3) -> Any:
    """Return networks in which every part does something."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in learner.parameters():
            width = weight.shape[-1] if weight.dim() else 1
            weight += size * torch.randn(weight.shape, generator=random) / width**0.5
    return learner


def editor_with(learner: Learner, corpus: Path, folder: Path, model: LanguageModel | None = None) -> Editor:
    """Return an editor of the networks' model, or of another copy, that uses these networks."""
    method = type(learner).__name__.removesuffix("Learner").lower().replace("transform", "mend")
    settings = learner.config.model_dump(mode="json")  # type: ignore[operator,union-attr]
    TrainFolder.create(folder).save_best(
        learner, {"method": method, "model": learner.lm.fingerprint, "settings": settings}
    )
    return make_editor(model or learner.lm, corpus, method, method_settings={**settings, "checkpoint": folder})


def dense(editor: Editor, edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Return the change of each weight that makes some edits."""
    patch, _ = editor.method.fit(editor.bench, edits, editor.state().method)
    return {name: delta.dense() for name, delta in patch.deltas.items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], slack: float = 1e-3) -> None:
    """Assert that changes of weights are equal, and something."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.norm() > 0, name
        assert (found[name] - wanted).norm() < slack * wanted.norm(), name


def row_by_row(
    network: GradientTransform, u: Tensor, delta: Tensor, tensor: int, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """g of each row in float64: z + relu(s (A B z + b) + o), block after block, behind a normalisation over the rows
    ``seen``.
    """
    found = []
    for row in torch.cat([u, delta], dim=1).double():
        h = row if seen is None else (row - seen.double().mean(0)) / (seen.double().std(0) + 1e-7)
        for block in range(len(network.left)):
            inner = network.left[block].double() @ (network.right[block].double() @ h) + network.bias[block].double()
            moved = network.scale[block][tensor].double() * inner + network.offset[block][tensor].double()
            h = h + torch.where(moved > 0, moved, 0.0)
        found.append(h)
    whole = torch.stack(found)
    return whole[:, : u.shape[1]], whole[:, u.shape[1] :]


def _keys(learner: Any) -> list[tuple[str, int]]:
    """Which network each weight has, and its place among that network's."""
    shapes = [tuple(oriented(learner.lm.layout.module_of(name)).shape) for name in learner.names]
    keys = [f"{d_in}x{d_out}" if learner.config.shared else str(n) for n, (d_out, d_in) in enumerate(shapes)]
    return [(key, keys[:number].count(key)) for number, key in enumerate(keys)]


def pseudo_pairs(learner: Any, pairs: Pairs, seen: Mapping[str, Tensor]) -> Pairs:
    """u~ and delta~ of all rows: the n-th weight of a shape has the n-th scale and offset of its network."""
    assert {key for key, _ in _keys(learner)} == learner.networks.keys()
    return {
        name: row_by_row(learner.networks[key], *pairs[name], place, seen.get(key))
        for name, (key, place) in zip(learner.names, _keys(learner), strict=True)
    }


def rows_by_network(learner: Any, pairs: Pairs) -> dict[str, Tensor]:
    """All rows that each network meets; none where it does not normalise."""
    found: dict[str, list[Tensor]] = {}
    for name, (key, _) in zip(learner.names, _keys(learner), strict=True):
        found.setdefault(key, []).append(torch.cat(pairs[name], dim=1))
    return {key: torch.cat(rows) for key, rows in found.items()} if learner.config.normalise else {}


def outer_loss(lm: LanguageModel, examples: Sequence[Edit], changes: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """NLL of the edits in other words and KL(p_base || p_edited) on the probes, by whole forwards and weights."""
    weights = {
        name: as_stored(lm, name, oriented(lm.layout.module_of(name)) + change.float())
        for name, change in changes.items()
    }
    likely, apart = [], []
    for edit in examples:
        asked = edit.model_copy(update={"prompt": edit.rephrase[0] if edit.rephrase else edit.prompt})
        likely.append(target_losses(lm, asked, weights))
        probe = edit.locality[0]
        base, now = (
            F.log_softmax(whole_logits(lm, probe.prompt, probe.answer, each, everywhere=True), -1)
            for each in ({}, weights)
        )
        apart.append((base.exp() * (base - now)).sum(1))
    return torch.cat(likely).mean(), torch.cat(apart).mean()
