"""The value optimisation: the vector that, put at the subject's last token in layer L, makes the model say the target.

In a causal model with a vector added at layer L, position t, nothing below L and nothing before t ever
changes. So the rows run through the model once; after that each step resumes behind layer L on the positions
from t on, reads the keys and values before t from the cache, and projects to the vocabulary at the few
positions that are scored (rome.md, cost; the plain form is the oracle in tests/oracles.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.descent import Adam, Descent, Strides
from everedit.engine.lane import Lane
from everedit.engine.lanes import build_lanes, passes
from everedit.engine.rows import chunks, essence_row, prompt_rows
from everedit.engine.token_losses import token_losses
from everedit.errors import NumericalError
from everedit.models import LanguageModel
from everedit.models.packed import Products, direct, packed
from everedit.models.tokens import Encoded

__all__ = ["FindTargets", "Target", "TargetConfig", "optimise_rows", "optimise_targets", "value_settings"]


# Adam's is the published one; that of strides was searched for (docs/results/settings.md, "Strides in place of Adam").
_RATES = {"adam": 0.5, "strides": 0.17}


class TargetConfig(BaseModel):
    """Settings of the value optimisation (ROME, equation 4, with the released code's form of the terms)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(25, ge=1, description="most forward passes; the last one makes no update")
    descent: Literal["adam", "strides"] = Field(
        "adam", description="how the vector moves: as published, or by steps of one length along the gradient"
    )
    lr: float = Field(0.5, gt=0, description="Adam's learning rate, or a stride's length as a share of ||origin||")
    weight_decay: float = Field(1e-3, ge=0, description="weight of ||delta|| / ||origin||^2")
    clamp: float = Field(4.0, gt=0, description="most ||delta|| as a multiple of ||origin||")
    kl: float = Field(0.0625, ge=0, description="weight of KL(P_delta || P_0) on '{subject} is a'")
    stop_loss: float = Field(0.05, ge=0, description="an edit stops when its total loss is below this")
    ease: bool = Field(
        False,
        description="PMET's rule: once every target token is the first choice its loss counts a tenth, and the edit "
        "stops when kl times the divergence is at most 0.01",
    )

    products: Products = Field(
        "float32",
        description="what the factors of matrix products, and their results, are rounded to, where a CPU has units for "
        "it; sums and all else are float32",
    )

    @classmethod
    def merged(cls, published: Mapping[str, Any], given: TargetConfig | None) -> TargetConfig:
        """Return the published settings of a family with those that a user gave on top.

        A rate says nothing to another descent than its own: who asks for another one gets that one's.
        """
        own = given.model_dump(exclude_unset=True) if given else {}
        settings = {**published, **own}
        descent = settings.get("descent", "adam")
        if "lr" not in own and ("lr" not in published or descent != published.get("descent", "adam")):
            settings["lr"] = _RATES[descent]
        return cls.model_validate(settings)


def value_settings(layer: int, site: str, prefixes: Sequence[str], config: TargetConfig) -> dict[str, Any]:
    """Return all that :func:`optimise_targets` depends on beside the model and the edits, as JSON-like values."""
    return {"layer": layer, "site": site, "prefixes": list(prefixes), "config": config.model_dump(mode="json")}


@dataclass(frozen=True)
class Target:
    """The result for one edit: ``origin`` and ``delta`` (H,) float32, whose sum is the value to write.

    ``before`` (H,) is what the MLP added to the residual stream there before the edit. ``losses`` is the total loss
    at each step, ``probability`` that of the target at the last one (the geometric mean over its tokens, averaged
    over the contexts).
    """

    origin: Tensor
    delta: Tensor
    losses: tuple[float, ...]
    probability: float
    before: Tensor

    @property
    def written(self) -> Tensor:
        """What the MLP, or at the site of its projection that projection, would have to give for the value, (H,)."""
        return self.before + self.delta

    @property
    def value(self) -> Tensor:
        """The vector to write."""
        return self.origin + self.delta


FindTargets = Callable[[Sequence[Edit]], list[Target]]
"""What finds the values of edits on the model as it is."""


def optimise_targets(
    lm: LanguageModel,
    edits: Sequence[Edit],
    prefixes: Sequence[str],
    layer: int,
    config: TargetConfig,
    *,
    site: str = "block",
    tokens_a_batch: int = 3072,
) -> list[Target]:
    """Return a target for each edit: the vector that makes the model say what is new, behind every prefix.

    The first prefix must be the empty one: it defines the origin. See :func:`optimise_rows`.
    """
    rows = [prompt_rows(lm, edit, prefixes, target=True) for edit in edits]
    essence = [essence_row(lm, edit) for edit in edits] if config.kl else []
    return optimise_rows(lm, rows, essence, layer, config, site=site, tokens_a_batch=tokens_a_batch)


def optimise_rows(
    lm: LanguageModel,
    rows: Sequence[Sequence[Encoded]],
    essence: Sequence[Encoded],
    layer: int,
    config: TargetConfig,
    *,
    site: str = "block",
    tokens_a_batch: int = 3072,
) -> list[Target]:
    """Return a target for each edit, optimised in batches; the result does not depend on the batching.

    ``rows[i]`` are edit i's texts with their targets and subjects, equally many for each edit, the bare one first;
    ``essence[i]`` is its "{subject} is a", or there are none and ``config.kl`` is 0. ``site`` is where the vector is
    added: ``"mlp"``, the MLP's output (ROME), ``"block"``, the block's output (MEMIT), ``"attention+mlp"``, one each at
    the outputs of both, of which the MLP's is returned (PMET), or ``"onward"``, the block's output from the subject's
    last token on.

    Raises :class:`NumericalError` if a loss is not finite.
    """
    # Edits with equally long tails share a batch, so that little of it is padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0].ids) - rows[i][0].subject_last)
    weights = [_cost(lm, rows[i]) for i in order]
    found: dict[int, Target] = {}
    for part in chunks(weights, tokens_a_batch):
        members = order[part]
        with direct([lm.model.base_model], config.products):
            lanes = build_lanes(
                lm,
                [rows[i] for i in members],
                [essence[i] for i in members] if essence else [],
                layer,
                site,
            )
        blocks = [lm.layout.block(above) for above in range(layer + 1, lm.layout.n_layers)]
        with packed([*blocks, lm.model.get_output_embeddings()], config.products):
            targets = _optimise(lm, lanes, len(members), config)
        found.update(zip(members, targets, strict=True))
    return [found[i] for i in range(len(rows))]


def _cost(lm: LanguageModel, rows: Sequence[Encoded]) -> int:
    """Tokens that a batch pays for an edit: its tails, or its logits where the vocabulary weighs more."""
    tail = max(len(row.ids) - row.subject_last for row in rows)
    reads = len(rows) * len(rows[0].target_ids)
    return max(len(rows) * tail, reads * int(lm.model.config.vocab_size) // 65_536)


def _optimise(lm: LanguageModel, lanes: list[Lane], n: int, config: TargetConfig) -> list[Target]:
    places, width = lanes[0].origin.shape[1:]
    origins = torch.zeros(n, places, width, device=lm.device)
    before, unsaid = torch.zeros(n, width, device=lm.device), torch.ones(n, device=lm.device)
    for lane in lanes:
        lane.put_origins(origins, before)
    live = torch.arange(n, device=origins.device)
    delta, norms = torch.zeros_like(origins), origins.norm(dim=-1)
    descent: Descent = Adam(delta, config.lr) if config.descent == "adam" else Strides(delta, config.lr * norms)
    done: dict[int, Target] = {}
    curves: list[list[float]] = [[] for _ in range(n)]
    for step in range(config.steps):
        last = step == config.steps - 1
        values, gradient = _decay(delta, norms[live], config)
        # With PMET's rule what was said at the step before decides: the terms of this step come in several passes.
        weight = torch.where((unsaid[live] == 0) & config.ease, 0.1, 1.0)
        terms = _Terms.none(delta)
        for group in passes(lm, lanes):
            terms = terms.plus(_terms(lm, group, delta, weight, config, with_gradient=not last))
        values, gradient, probability = values + terms.loss, gradient + terms.gradient, terms.probability
        unsaid[live] = terms.unsaid
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                what="the value optimisation met a loss that is not finite",
                fix="lower the learning rate (lr), or load the model in a wider dtype",
            )
        for row, value in zip(live.tolist(), values.tolist(), strict=True):
            curves[row].append(value)
        ended = values < config.stop_loss
        if config.ease:
            ended = ended | ((terms.unsaid == 0) & (config.kl * terms.divergence <= 0.01))
        ended = ended | last
        for at in ended.nonzero()[:, 0].tolist():
            row = int(live[at])
            done[row] = Target(
                # Of two places the last one is the MLP's.
                origins[row, -1].clone(),
                delta[at, -1].clone(),
                tuple(curves[row]),
                float(probability[at]),
                before[row].clone(),
            )
        if bool(ended.all()):
            break
        delta = descent.step(delta, gradient)
        limit = config.clamp * norms[live]
        delta = delta * (limit / delta.norm(dim=-1).clamp_min(1e-12)).clamp_max(1)[..., None]
        if bool(ended.any()):
            keep = (~ended).nonzero()[:, 0]
            live, delta = live[keep], delta[keep]
            descent.keep(keep)
            lanes = [kept for lane in lanes if len((kept := lane.keep(keep)).owner)]
    return [done[row] for row in range(n)]


@dataclass(frozen=True)
class _Terms:
    """Sums over lanes for each edit: loss, probability of the target, divergence and unsaid target tokens, (n,) each,
    and the gradient (n, places, H).
    """

    loss: Tensor
    probability: Tensor
    divergence: Tensor
    unsaid: Tensor
    gradient: Tensor

    @classmethod
    def none(cls, delta: Tensor) -> _Terms:
        """Return zeros."""
        zero = torch.zeros(len(delta), device=delta.device)
        return cls(zero, zero, zero, zero, torch.zeros_like(delta))

    def plus(self, other: _Terms) -> _Terms:
        """Return the sums of both."""
        return _Terms(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def _terms(
    lm: LanguageModel,
    lanes: Sequence[Lane],
    delta: Tensor,
    weight: Tensor,
    config: TargetConfig,
    *,
    with_gradient: bool,
) -> _Terms:
    """Return what some lanes contribute; ``weight`` (n,) is that of an edit's target in its loss."""
    free = delta.detach().requires_grad_(with_gradient)
    nll, probability, penalty, unsaid = (torch.zeros(len(delta), device=delta.device) for _ in range(4))
    with torch.set_grad_enabled(with_gradient):
        kept, read = zip(*(lane.states_read(lm, free) for lane in lanes), strict=True)
        # One product with the vocabulary for all lanes: it reads the largest matrix of a small model once.
        losses, chosen = token_losses(lm, torch.cat(read), torch.cat([lane.reads.labels for lane in lanes]))
        counts = [len(part) for part in read]
        for lane, rows, nlls, choices in zip(lanes, kept, losses.split(counts), chosen.split(counts), strict=True):
            lane.add_divergence(lm.logits(rows), penalty)
            lane.add_losses(nlls, choices, nll, probability, unsaid)
        loss = weight * nll + config.kl * penalty
    gradient = torch.autograd.grad(loss.sum(), free)[0] if with_gradient else torch.zeros_like(delta)
    return _Terms(loss.detach(), probability, penalty.detach(), unsaid, gradient)


def _decay(delta: Tensor, norms: Tensor, config: TargetConfig) -> tuple[Tensor, Tensor]:
    """Return weight_decay * ||delta|| / ||origin||^2, summed over the places, and its gradient, 0 where delta is."""
    size = delta.norm(dim=-1)
    scale = config.weight_decay / norms**2
    return (scale * size).sum(-1), (scale / size.clamp_min(1e-20))[..., None] * delta
