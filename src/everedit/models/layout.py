"""A model's layout: the modules that editing reads and writes, found by family or by structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from everedit.errors import ModelError, NotApplicable
from everedit.models.discover import discover
from everedit.models.families import Family, family_for
from everedit.models.hooks import capture, changed_output, stopping_at

__all__ = ["Layout", "oriented"]


_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "dense_act_fn")


def oriented(module: nn.Module) -> Tensor:
    """Return the module's weight as a view of shape (d_out, d_in), whichever way round it is stored."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data.T if isinstance(module, Conv1D) else weight.data


@dataclass(frozen=True)
class Layout:
    """The parts of one loaded model, by their names in the literature.

    Layers are counted from 0. ``hidden_size`` is H, ``inner_size`` is D, the width of the MLP's key.
    """

    family: Family
    model: PreTrainedModel
    n_layers: int
    hidden_size: int
    inner_size: int
    mlp_in_names: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Layout:
        """Return the layout of ``model``. Raises :class:`ModelError` that says what could not be found."""
        family = family_for(model.config.model_type) or discover(model)
        blocks = _find(model, family.blocks, "its list of blocks", family)
        first = blocks[0]  # type: ignore[index]
        names = next((names for names in family.mlp_in if all(_has(first, name) for name in names)), None)
        if names is None:
            options = " or ".join("+".join(option) for option in family.mlp_in)
            raise ModelError(
                what=f"block 0 has no MLP input projection {options}",
                where=f"model_type {model.config.model_type}, family {family.name}",
                fix="add a file for this model to everedit/models/families",
            )
        _find(first, family.attention_out, "the attention's output projection", family)
        if not _left_out(model, family.final_norm):
            _find(model, family.final_norm, "the final norm", family)
        out = _find(first, family.mlp_out, "the MLP's output projection", family)
        hidden, inner = oriented(out).shape
        return cls(family, model, len(blocks), hidden, inner, names)  # type: ignore[arg-type]

    @property
    def is_decoder_only(self) -> bool:
        """False for encoder-decoder models such as T5."""
        return self.family.encoder_blocks is None

    def require_decoder_only(self, who: str) -> None:
        """Raise :class:`NotApplicable` unless the model is a causal decoder."""
        if not self.is_decoder_only:
            raise NotApplicable(
                what=f"{who} works on decoder-only models, and {self.family.name} is an encoder-decoder",
                fix="choose a method whose traits list encoder-decoder models (everedit methods ls)",
            )

    def require_mlp_in_residual(self, who: str) -> None:
        """Raise :class:`NotApplicable` unless a change of the MLP's output moves the block's output by itself.

        Tried on block 0 rather than read from the config: post-norm blocks, scaled residuals and mixtures of
        experts fail, whatever they are called. A norm named by the family as ``mlp_norm`` is allowed for.
        """
        if not self._mlp_moves_residual():
            raise NotApplicable(
                what=f"{who} writes values into the residual stream through the MLP's down projection, and in this "
                "model the projection's output is changed on its way there",
                where=f"model_type {self.model.config.model_type}, block 0",
                fix="choose a method that does not write MLP values, or a model with plain pre-norm blocks",
            )

    @torch.no_grad()
    def _mlp_moves_residual(self) -> bool:
        block, out, norm = self.block(0), self.mlp_out(0), self.mlp_norm(0)
        device = self.model.get_input_embeddings().weight.device
        ids = torch.arange(1, 4, device=device)[None] % self.model.config.vocab_size

        def run() -> dict[str, Tensor]:
            with capture(outputs={"mlp": out, "block": block}, rows=1) as seen, stopping_at(block):
                self.model.base_model(input_ids=ids, use_cache=False)
            return seen

        plain = run()
        if plain.keys() != {"mlp", "block"} or plain["mlp"].shape != plain["block"].shape:
            return False
        change = torch.zeros_like(plain["mlp"])
        size = plain["block"].float().pow(2).mean().sqrt()
        ramp = torch.linspace(-1, 1, self.hidden_size, device=device)
        change[0, 1] = (ramp.roll(self.hidden_size // 3) * size).to(change.dtype)
        with changed_output(out, lambda _, output: output + change.view_as(output)):
            moved = run()["block"]
        wanted = change if norm is None else norm(plain["mlp"] + change) - norm(plain["mlp"])
        error = (moved.float() - plain["block"].float() - wanted.float()).norm()
        # Wide enough for bfloat16, narrow enough for any scaling of the residual.
        return bool(error <= 0.05 * wanted.float().norm())

    def block(self, layer: int) -> nn.Module:
        """Return the transformer block of ``layer``."""
        if not 0 <= layer < self.n_layers:
            raise ModelError(what=f"there is no layer {layer}", fix=f"choose a layer between 0 and {self.n_layers - 1}")
        return self.model.get_submodule(f"{self.family.blocks}.{layer}")

    def mlp_out(self, layer: int) -> nn.Module:
        """Return the MLP's down projection, whose input is the key and whose output is the value."""
        return self.block(layer).get_submodule(self.family.mlp_out)

    def mlp_in(self, layer: int) -> nn.Module:
        """Return the first of the MLP's input projections, whose input is the MLP's own."""
        return self.block(layer).get_submodule(self.mlp_in_names[0])

    def mlp(self, layer: int) -> nn.Module | None:
        """Return the module that is the whole MLP, if the family has one."""
        path = self.family.mlp_out.rpartition(".")[0]
        return self.block(layer).get_submodule(path) if path else None

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation function of the MLPs."""
        config = self.model.config
        name = next(value for key in _ACTIVATIONS if (value := getattr(config, key, None)))
        function: Callable[[Tensor], Tensor] = ACT2FN[name]
        return function

    def attention_out(self, layer: int) -> nn.Module:
        """Return the attention's output projection."""
        return self.block(layer).get_submodule(self.family.attention_out)

    def mlp_out_weight(self, layer: int) -> str:
        """Return the parameter's name of the down projection's weight."""
        self.block(layer)
        return f"{self.family.blocks}.{layer}.{self.family.mlp_out}.weight"

    def mlp_in_weights(self, layer: int) -> list[str]:
        """Return the parameters' names of the MLP's input projections, the gate first where there is one."""
        self.block(layer)
        return [f"{self.family.blocks}.{layer}.{name}.weight" for name in self.mlp_in_names]

    def input_width(self, name: str) -> int:
        """Return how many values one of the MLP's input projections gives."""
        return int(oriented(self.block(0).get_submodule(name)).shape[0])

    def module_of(self, weight: str) -> nn.Module:
        """Return the module that owns the parameter ``weight``."""
        return self.model.get_submodule(weight.removesuffix(".weight"))

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """Return the norm between the MLP's output and the residual stream, if the family has one."""
        return self.block(layer).get_submodule(self.family.mlp_norm) if self.family.mlp_norm else None

    def residual_step(self, layer: int, mlp_output: Tensor, residual: Tensor) -> Tensor:
        """Return the change of the MLP output that moves the residual stream by ``residual``; both (..., H).

        Where nothing stands between the two that is ``residual`` itself. After a norm n(m) = g * m / rms(m)
        only directions can be reached: the output whose norm points at the wanted sum, at its present length.
        """
        norm = self.mlp_norm(layer)
        if norm is None:
            return residual
        scale = norm(torch.ones_like(mlp_output))
        wanted = (norm(mlp_output) + residual) / scale
        wanted = wanted / wanted.pow(2).mean(-1, keepdim=True).sqrt()
        return wanted * mlp_output.pow(2).mean(-1, keepdim=True).sqrt() - mlp_output

    def describe(self) -> dict[str, object]:
        """Return the layout as plain values, for people and for ``--json``."""
        family, first = self.family, 0
        return {
            "model_type": self.model.config.model_type,
            "family": family.name,
            "decoder_only": self.is_decoder_only,
            "layers": self.n_layers,
            "hidden_size": self.hidden_size,
            "inner_size": self.inner_size,
            "blocks": family.blocks,
            "mlp_in": list(self.mlp_in_names),
            "mlp_out": family.mlp_out,
            "mlp_out_stored_transposed": isinstance(self.mlp_out(first), Conv1D),
            "attention_out": family.attention_out,
            "mlp_norm": family.mlp_norm,
            "final_norm": None if _left_out(self.model, family.final_norm) else family.final_norm,
            "tied_embeddings": bool(self.model.config.tie_word_embeddings),
        }


def _left_out(model: nn.Module, path: str) -> bool:
    """True if the model has a place for this part and leaves it empty, as post-norm OPT does its final norm."""
    parent, _, name = path.rpartition(".")
    return _has(model, parent) and getattr(model.get_submodule(parent), name, path) is None


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _find(root: nn.Module, path: str, what: str, family: Family) -> nn.Module:
    if _has(root, path):
        return root.get_submodule(path)
    raise ModelError(
        what=f"could not find {what} at '{path}'",
        where=f"{type(root).__name__}, family {family.name}",
        fix="this model does not have the shape that its model_type promises; describe it in a family file",
    )
