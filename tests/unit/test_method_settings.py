"""A method's settings are the published ones for the model at hand, under whatever a user gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from everedit.editor import Editor
from everedit.engine.settings import validated
from everedit.errors import EditError, ModelError, UnknownName
from everedit.methods import method_class, method_names
from tests.support.loading import fresh


def layout(family: str, n_layers: int, hidden_size: int = 4096) -> Any:
    mlp = {"inner_size": 4 * hidden_size, "mlp_in_names": ("mlp.up",), "input_width": lambda name: 4 * hidden_size}
    return SimpleNamespace(family=SimpleNamespace(name=family), n_layers=n_layers, hidden_size=hidden_size, **mlp)


ROME_TABLE = {
    # family, layers: layer, steps, lr, weight decay, clamp, kl (rome.md, "Hyperparameters")
    ("gpt2", 24): (8, 20, 0.5, 0.5, 3.0, 0.0625),
    ("gpt2", 36): (12, 20, 0.5, 0.5, 4.0, 0.0625),
    ("gpt2", 48): (17, 20, 0.5, 0.5, 4.0, 0.0625),
    ("gptj", 28): (5, 20, 0.5, 0.5, 4.0, 0.0625),
    ("gpt_neox", 44): (15, 20, 0.5, 0.5, 4.0, 0.0625),
    ("llama", 32): (5, 25, 0.5, 1e-3, 4.0, 0.0625),
    ("llama", 28): (5, 25, 0.5, 1e-3, 4.0, 0.0625),
}
MEMIT_TABLE = {
    # family, layers: first, last, steps, lr, weight decay, clamp, kl, weight of the moments (memit.md)
    ("gpt2", 48): (13, 17, 20, 0.5, 0.5, 0.75, 0.0625, 20_000.0),
    ("gptj", 28): (3, 8, 25, 0.5, 0.5, 0.75, 0.0625, 15_000.0),
    ("llama", 32): (4, 8, 25, 0.5, 1e-3, 4.0, 0.0625, 15_000.0),
    ("llama", 28): (4, 8, 25, 0.5, 1e-3, 4.0, 0.0625, 15_000.0),
}


@pytest.mark.parametrize(("model", "row"), ROME_TABLE.items())
def test_romes_settings_are_the_published_ones(model: tuple[str, int], row: tuple[float, ...]) -> None:
    config: Any = method_class("rome").Config().resolved(layout(*model))
    t = config.target
    assert (config.layer, t.steps, t.lr, t.weight_decay, t.clamp, t.kl) == row
    assert (t.stop_loss, config.contexts) == (0.05, ((5, 10), (10, 10)))


@pytest.mark.parametrize(("model", "row"), MEMIT_TABLE.items())
def test_memits_settings_are_the_published_ones(model: tuple[str, int], row: tuple[float, ...]) -> None:
    config: Any = method_class("memit").Config().resolved(layout(*model))
    t = config.target
    found = (config.layers[0], config.layers[-1], t.steps, t.lr, t.weight_decay, t.clamp, t.kl, config.moment_weight)
    assert found == row
    assert config.layers == tuple(range(config.layers[0], config.layers[-1] + 1))
    assert (config.contexts, config.share) == (((10, 5),), "equal")


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize(("family", "depth"), [("llama", 16), ("gpt2", 12), ("opt", 24), ("gemma", 18), ("x", 4)])
def test_where_nothing_is_published_layers_are_a_fraction_of_the_depth(method: str, family: str, depth: int) -> None:
    kind = method_class(method)
    layers = kind(kind.Config().resolved(layout(family, depth))).layers()
    assert list(layers) == sorted(set(layers))
    # Methods that write values choose the lower half; fine-tuning trains further up.
    highest = depth // 2 if kind.traits.writes_mlp_values else depth - 1
    assert all(0 <= layer <= highest for layer in layers)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_what_a_user_gives_goes_over_the_published_values_one_by_one(method: str) -> None:
    kind = method_class(method)
    config: Any = validated(kind.Config, {"target": {"lr": 0.1}}, "").resolved(layout("gpt2", 48))  # type: ignore[attr-defined]
    assert (config.target.lr, config.target.steps, config.target.weight_decay) == (0.1, 20, 0.5)
    assert config.resolved(layout("gpt2", 48)) == config


def test_bad_settings_are_refused() -> None:
    with pytest.raises(EditError, match=r"(?s)layrs.*known settings: layers, target.*moment_weight"):
        validated(method_class("memit").Config, {"layrs": [1]}, "method memit")
    with pytest.raises(ModelError, match=r"(?s)no layer 4.*between 0 and 3"):
        Editor(fresh("gpt2"), "memit", method_settings={"layers": [1, 4]})
    given: Any = Editor(fresh("gpt2"), "memit", method_settings={"layers": [2, 0, 2]}).method.config
    assert given.layers == (0, 2)
    with pytest.raises(UnknownName, match="did you mean rome"):
        method_class("rone")


def test_every_method_says_what_it_is() -> None:
    for name in method_names():
        kind = method_class(name)
        assert kind.name == name
        assert kind.traits.title
        assert kind.traits.changes in ("weights", "prompt", "module")
        assert set(kind.Config.model_fields) == set(kind.Config.model_json_schema()["properties"])


def test_what_was_searched_for_a_small_model_goes_on_top_of_what_makes_the_method() -> None:
    small = layout("llama", 30, 576)
    found: dict[str, Any] = {
        name: method_class(name).Config().resolved(small) for name in ("memit", "pmet", "alphaedit", "rlsedit")
    }
    assert all((config.target.lr, config.target.steps) == (1.0, 40) for config in found.values())
    assert all(config.layers == (14, 15, 16) for config in found.values())
    assert found["pmet"].target.ease
    assert not found["memit"].target.ease
    assert [found[name].target.clamp for name in ("memit", "pmet", "alphaedit", "rlsedit")] == [4.0, 1.0, 0.75, 0.75]


def test_what_somebody_set_wins_over_what_was_searched() -> None:
    small, other = layout("llama", 30, 576), layout("llama", 30, 640)
    kind: Any = method_class("ultraedit").Config
    searched, published = kind().resolved(small), kind().resolved(other)
    assert searched.eta != published.eta == 1e-6
    assert kind(eta=1e-6).resolved(small).eta == 1e-6
    assert kind(eta=1e-6).resolved(small).modules == searched.modules
    assert kind(modules={"mlp_out": (3,)}).resolved(small).modules == {"mlp_out": (3,)}
