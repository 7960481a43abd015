"""Loaded tiny models, and edits of the facts that they know."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from everedit.edit import Edit, Probe
from everedit.models import LanguageModel, load_model
from tests.support import facts, tiny

DECODERS: tuple[str, ...] = tuple(family for family in tiny.FAMILIES if family != "t5")


def fresh(family: str, dtype: str = "float32") -> LanguageModel:
    """Return a family's trained model, newly loaded, to do with as one likes."""
    return load_model(tiny.trained(family), device="cpu", dtype=dtype)


@cache
def shared(family: str, dtype: str = "float32") -> LanguageModel:
    """Return a family's trained model, loaded once a process: leave it as it was."""
    return fresh(family, dtype)


def edit_of(fact: facts.Fact, target: str | None = None, **more: object) -> Edit:
    """Return the edit that makes a fact's counterfactual answer, or ``target``, its answer."""
    target = facts.counterfactual(fact) if target is None else target
    values = {"prompt": fact.prompt, "subject": fact.subject, "target_new": target, "rephrase": (fact.rephrase,)}
    return Edit.model_validate({**values, **more})


def probe_of(fact: facts.Fact) -> Probe:
    """Return the probe that asks for a fact."""
    return Probe(prompt=fact.prompt, answer=fact.answer)


def bits(lm: LanguageModel) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in lm.model.state_dict().items()}


def same_bits(lm: LanguageModel, before: dict[str, Tensor]) -> bool:
    """Whether every parameter and buffer has the bits that :func:`bits` saw."""
    now = lm.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def hooks_left(lm: LanguageModel) -> list[str]:
    """Return the names of modules with a hook or with a forward of their own."""
    return [
        name
        for name, module in lm.model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    ]
