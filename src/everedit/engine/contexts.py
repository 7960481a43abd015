"""Random texts in front of a prompt, sampled from the model, so that an edit holds in more than one context."""

from __future__ import annotations

from everedit.models import LanguageModel

__all__ = ["sample_prefixes"]


def sample_prefixes(
    lm: LanguageModel, groups: tuple[tuple[int, int], ...], starts: tuple[str, ...], seed: int
) -> list[str]:
    """Return the empty prefix and, for each group (total tokens, count), ``count`` sampled texts ending in ". ".

    ``starts`` are the first words, taken in turn; with none the text begins at the start token, which counts
    toward the total (ROME, appendix; MEMIT, section 4.1). Sampled with top-k 5. Braces and line breaks, which
    would disturb templates and spans, become spaces.
    """
    prefixes = [""]
    for group, (tokens, count) in enumerate(groups):
        begin = [starts[index % len(starts)] if starts else "" for index in range(count)]
        used = [len(lm.encode(text).ids) if text else 1 for text in begin]
        new = max(1, tokens - max(used))
        sampled = lm.generate(begin, max_new_tokens=new, min_new_tokens=new, top_k=5, seed=seed + group)
        prefixes += [_tidy(start + text) + ". " for start, text in zip(begin, sampled, strict=True)]
    return prefixes


def _tidy(text: str) -> str:
    return " ".join(text.replace("{", " ").replace("}", " ").split())
