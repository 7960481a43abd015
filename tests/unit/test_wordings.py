"""Other ways to ask for what a prompt asks for: which are found, and how they are read off records."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everedit.engine.relation import built_in_relations, built_in_wordings
from everedit.engine.router import Address
from everedit.engine.wordings import Wordings


@pytest.mark.parametrize(
    ("names", "prompt", "wording"),
    [
        (("Ann Bow",), "Ann Bow was born in", "{} was born in"),
        (("Ann Bow", "Annie"), "Where does ANNIE live?", "Where does {} live?"),
        (("Ann Bow",), "It rained. A dog barked at noon. Ann Bow, a native", "{}, a native"),
        # What does not name the subject once where it asks cannot be put to another.
        (("Ann Bow",), "Ann Bow is here. Who is her father?", None),
        (("Ann Bow",), "Is Ann Bow the mother of Ann Bow?", None),
        (("Ann Bow",), "Ann Bow wrote f({})", None),
        ((), "Ann Bow was born in", None),
    ],
)
def test_a_prompt_is_read_as_a_wording(names: tuple[str, ...], prompt: str, wording: str | None) -> None:
    assert Address(names, prompt).wording() == wording


def test_a_wording_masked_is_what_prompts_are_compared_by() -> None:
    texts = [text for group in built_in_relations() for text in group]
    wordings = built_in_wordings()
    assert len(wordings) == len(texts) > 3000
    read = 0
    for wording, text in zip(wordings[::50], texts[::50], strict=True):
        address = Address(("Ann Bow",), wording.replace("{}", "Ann Bow"))
        if (found := address.wording()) is not None:
            assert found in wording
            assert address.key() in text
            read += 1
    assert read > 0.9 * len(wordings[::50])


def test_the_nearest_come_first_each_once_and_never_the_prompt_itself() -> None:
    random = torch.Generator().manual_seed(0)
    keys = F.normalize(torch.randn(40, 8, generator=random), dim=1)
    texts: list[str | None] = [f"{{}} has the number {number}" for number in range(40)]
    texts[7], texts[9] = None, "{} HAS the number 3"
    wordings = Wordings(texts, keys)
    key = F.normalize(keys[3] + 0.1 * keys[11], dim=0)
    order = [number for number in (keys @ key).argsort(descending=True).tolist() if number not in (7, 9)]
    assert wordings.near(key, 5) == [texts[number] for number in order[:5]]
    assert order[0] == 3
    assert wordings.near(key, 5, "{} Has The Number 3") == [texts[number] for number in order[1:6]]
    assert wordings.near(key, 100) == [texts[number] for number in order]
    assert wordings.near(key, 0) == []
