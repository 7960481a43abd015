"""What memories beside one layer's MLP share: their layer, the templates around an edit, and texts it is not about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from typing_extensions import Self

from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.spread import at_depth, check_layers
from everedit.errors import EditError
from everedit.methods._base import Method, MethodConfig
from everedit.models.layout import Layout
from everedit.models.tokens import Encoded, join

__all__ = ["STARTS", "BesideConfig", "BesideMethod", "Contexts", "irrelevant_texts", "pick", "templated"]

Contexts = tuple[tuple[int, int], ...]
STARTS = ("I", "You", "Because", "Yes", "Q: ")
"""First words of the sampled prefixes (wise.md, "Templates")."""


class BesideConfig(MethodConfig):
    """Settings that these methods have in common; None means the published value for the family."""

    published_layers: ClassVar[dict[tuple[str, int], int]] = {}
    """Layers by family and number of layers."""
    depth: ClassVar[float] = 27 / 32
    """The layer's place where none is published."""

    layer: int | None = Field(None, description="layer of the memory; published, else at the same depth as in LLaMA")

    def resolved(self, layout: Layout) -> Self:
        """Return the config with the layer."""
        config, layers = self.with_searched(layout), layout.n_layers
        layer = config.layer
        if layer is None:
            layer = self.published_layers.get((layout.family.name, layers), at_depth(self.depth, layers))
        return config.model_copy(update={"layer": check_layers((layer,), layers)[0]})


class BesideMethod(Method):
    """A memory around the MLP of one layer."""

    config: BesideConfig

    @property
    def layer(self) -> int:
        """The layer of the memory."""
        assert self.config.layer is not None
        return self.config.layer

    def layers(self) -> tuple[int, ...]:
        """Return the layer of the memory."""
        return (self.layer,)


def templated(bench: Workbench, edit: Edit, contexts: Contexts) -> list[Encoded]:
    """Return the edit's prompt and target alone and behind each sampled prefix."""
    prefixes = bench.contexts(contexts, STARTS)
    return [bench.lm.encode(edit.prompt, edit.target_new, prefix=prefix) for prefix in prefixes]


def irrelevant_texts(bench: Workbench, pool: str, path: str | None, *, answers: bool = True) -> list[str]:
    """Return texts that no edit is about: the locality probes of a data set, or its prompts where it has none.

    Raises :class:`EditError` if there are none.
    """

    def gathered() -> list[str]:
        return [_unrelated(edit, answers) for edit in bench.pool(pool, path)]

    texts = bench.once(("irrelevant", pool, path, answers), gathered)
    if not texts:
        raise EditError(
            what="the pool holds no text", where=path or pool, fix="choose another pool (method.irrelevant)"
        )
    return texts


def _unrelated(edit: Edit, answers: bool) -> str:
    prompt, answer = edit.prompt, edit.ground_truth or edit.target_new
    if edit.locality:
        prompt, answer = edit.locality[0].prompt, edit.locality[0].answer
    return join(prompt, answer) if answers else prompt


def pick(texts: Sequence[str], number: int, edit: Edit) -> str:
    """Return the text of a number that is not part of the edit's prompt."""
    for offset in range(len(texts)):
        text = texts[(number + offset) % len(texts)]
        if text not in edit.prompt:
            return text
    raise EditError(what="every text of the pool is part of this prompt", where=edit.prompt, fix="choose another pool")
