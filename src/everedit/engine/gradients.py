"""What one forward and backward pass says of linear modules: their inputs, and the loss's gradient at their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everedit.models import LanguageModel
from everedit.models.forced import Forced
from everedit.models.tokens import Encoded

__all__ = ["joined", "module_gradients", "recorded_gradients"]


def module_gradients(
    lm: LanguageModel, texts: Sequence[Encoded], modules: Mapping[str, nn.Module], *, positions: str = "answers"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by name, inputs (N, d_in) and gradients of the loss by the outputs (N, d_out), float32.

    The loss is the mean over all target tokens of ``texts``. ``positions``: ``"answers"`` collects the N places that
    predict a target token (the prompt's last token and the target's but the last), ``"all"`` every token that is read.
    Nothing below the first of ``modules`` keeps anything for the backward pass.
    """
    forced = Forced.of(lm, texts)

    def loss() -> Tensor:
        states = lm.states(**forced.inputs)
        return F.cross_entropy(lm.logits(states[forced.rows, forced.columns]), forced.labels)

    def rows(tensor: Tensor) -> Tensor:
        whole = tensor.view(len(texts), -1, tensor.shape[-1])
        return (whole[forced.rows, forced.columns] if positions == "answers" else whole[forced.real]).float()

    return {name: (rows(x), rows(gradient)) for name, (x, gradient) in recorded_gradients(loss, modules).items()}


def recorded_gradients(
    loss: Callable[[], Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, by name, each module's inputs (…, d_in) in one forward pass and the gradients (…, d_out) of ``loss()`` by
    its outputs.
    """
    with torch.enable_grad(), _recorded(modules) as (inputs, outputs):
        value = loss()
    gradients = torch.autograd.grad(value, list(outputs.values()))
    return {name: (inputs[name], gradient.detach()) for name, gradient in zip(outputs, gradients, strict=True)}


def joined(parts: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the rows of several passes together."""
    return {
        name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
        for name in parts[0]
    }


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Collect inputs and outputs; where no gradient would flow yet, it begins at the output."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> Tensor:
                inputs[name] = args[0].detach()
                outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
                return outputs[name]

            stack.callback(module.register_forward_hook(hook).remove)
        yield inputs, outputs
