"""The slow, obvious versions of what the engine does fast: written from the papers, sharing none of its code.

They are the oracles of the tests and the baselines of the benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.models import LanguageModel


@dataclass
class PlainTarget:
    origin: Tensor
    delta: Tensor
    losses: list[float]


def plain_target(lm: LanguageModel, edit: Edit, prefixes: list[str], layer: int, config, site: str) -> PlainTarget:
    """ROME's and MEMIT's value optimisation as in the released codes: whole rows through the whole model with
    all logits at every step, one edit at a time, a hook that adds the vector, and torch's own Adam (or strides).
    """
    texts = [lm.encode(edit.prompt, edit.target_new, subject=edit.subject, prefix=prefix) for prefix in prefixes]
    essence = lm.encode(f"{edit.subject} is a", subject=edit.subject)
    rows = [list(text.ids[:-1]) for text in texts] + [list(essence.ids)]
    lookup = torch.tensor([text.subject_last for text in texts] + [essence.subject_last], device=lm.device)
    batch = lm.pad(rows, side="right")
    lines = torch.arange(len(rows), device=lm.device)
    module = lm.layout.mlp_out(layer) if site == "mlp" else lm.layout.block(layer)
    delta = torch.zeros(lm.layout.hidden_size, requires_grad=True, device=lm.device)
    origin: list[Tensor] = []

    def add(_module, _args, output):
        given = output[0] if isinstance(output, tuple) else output
        # OPT runs its MLP on all tokens in a line.
        hidden = given.reshape(*batch.ids.shape, -1).clone()
        if not origin:
            origin.append(hidden[0, lookup[0]].detach().clone().float())
        hidden[lines, lookup] = hidden[lines, lookup] + delta.to(hidden.dtype)
        hidden = hidden.view_as(given)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(add)
    optimiser = torch.optim.Adam([delta], lr=config.lr)
    losses, initial, directions = [], None, []
    try:
        for step in range(config.steps):
            optimiser.zero_grad()
            logs = F.log_softmax(lm.model(**batch.inputs(), use_cache=False).logits.float(), dim=-1)
            nll = torch.zeros((), device=lm.device)
            for line, text in enumerate(texts):
                at = torch.arange(text.prompt_end - 1, len(text.ids) - 1, device=lm.device)
                labels = torch.tensor(text.target_ids, device=lm.device)
                nll = nll - logs[line, at].gather(-1, labels[:, None]).mean() / len(texts)
            now = logs[len(texts), lookup[-1]]
            initial = now.detach() if initial is None else initial
            kl = F.kl_div(initial[None], now[None], log_target=True, reduction="batchmean")
            loss = nll + config.kl * kl + config.weight_decay * delta.norm() / origin[0].norm() ** 2
            losses.append(float(loss.detach()))
            if losses[-1] < config.stop_loss or step == config.steps - 1:
                break
            loss.backward()
            if config.descent == "strides":
                directions.append(delta.grad / delta.grad.norm())
                shares = torch.tensor([0.5**age for age in reversed(range(len(directions)))])
                delta.data -= config.lr * origin[0].norm() * (shares / shares.sum()) @ torch.stack(directions)
            else:
                optimiser.step()
            with torch.no_grad():
                limit = config.clamp * origin[0].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        handle.remove()
    return PlainTarget(origin[0], delta.detach(), losses)
