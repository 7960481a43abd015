"""The card: a Markdown page with every fact, who gave it, when, from what source, until when, and what editing cost."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict

from everedit._version import __version__
from everedit.evaluation.protocols import METRICS
from everedit.export.source import Damage, FactRecord, Source
from everedit.models import LanguageModel

__all__ = ["Options", "card", "escaped", "write"]

WHAT = "a card"
# What begins or ends something in Markdown, HTML or the mathematics of GitHub, wherever in a line it stands.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")
_SAFE_URL = re.compile(r"[A-Za-z0-9\-._~:/?#@%&=+,;]+")
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_USE = {
    "merged": "Load this folder with `from_pretrained`, like any model of transformers.",
    "peft": "Load it with `PeftModel.from_pretrained(base, FOLDER)` on the base model named below, and no other.",
    "gguf": "Run the `.gguf` file with llama.cpp or anything built on it.",
    "card": "This page describes the model; it holds no weights.",
}


class Options(BaseModel):
    """Settings of this export: none."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def write(source: Source, lm: LanguageModel, folder: Path, options: Options) -> dict[str, Any]:
    """The card itself is written with every export: there is nothing more to write."""
    return {"facts": len(source.facts)}


def card(source: Source, about: Mapping[str, Any]) -> str:
    """Return the card of an export of ``source``; ``about`` is what ``everedit.json`` says of it."""
    format, name = about["format"], about["base"]["name"]
    parts = [
        _front_matter(name, format),
        f"# {escaped(name)}, edited",
        f"{_count(len(source.facts), 'fact')} edited with Everedit {__version__}. {_USE[format]}",
        *_peft_notes(about["figures"] if format == "peft" else {}),
        "## What it was made from",
        _table(("what", "value"), _origins(source, about)),
        "## What editing cost",
        *_damage(source.damage),
        "## Facts",
        *_facts(source.facts),
    ]
    if about["weights"]:
        rows = [
            (escaped(name), _number(row["norm"]), _number(row["relative_norm"]), f"`{row['sha256']}`")
            for name, row in about["weights"].items()
        ]
        parts += [
            "## Weights",
            "Norms are Frobenius norms of the change, absolute and relative to the weight. The hash is of the edited "
            "weight, (d_out, d_in) row by row, in the dtype that it was edited in.",
            _table(("weight", "norm of the change", "relative", "SHA-256 of the edited weight"), rows),
        ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Return ``text`` on one line such that Markdown shows every character as it is.

    Line ends and other control characters become spaces. Characters that turn the direction of text round are named,
    so that nobody reads something else than what is there.
    """
    return _SPECIAL.sub(r"\\\1", " ".join("".join(map(_shown, text)).split()))


def _shown(char: str) -> str:
    if char in _DIRECTIONS:
        return f"(U+{ord(char):04X})"
    return " " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char


def _link(text: str) -> str:
    """Return a web address as a link, and anything else as text."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return escaped(text)
    if parts.scheme in ("http", "https") and parts.netloc and _SAFE_URL.fullmatch(text):
        return f"<{text}>"
    return escaped(text)


def _front_matter(name: str, format: str) -> str:
    about: dict[str, Any] = {"tags": ["everedit", "model-editing"]}
    # The hub knows models by their ids there; aliases and folders mean nothing to it.
    if _HUB_ID.fullmatch(name):
        about["base_model"] = name
    if format in ("merged", "peft"):
        about["library_name"] = "transformers" if format == "merged" else "peft"
    return f"---\n{yaml.safe_dump(about, sort_keys=True)}---"


def _peft_notes(figures: Mapping[str, Any]) -> list[str]:
    if not figures:
        return []
    error = figures["relative_error"]
    exact = f"The adapter has rank {figures['rank']}; the change has rank {figures['rank_of_change']}. "
    exact += f"Left out of the change, at most, in one weight: {_number(error)} of its norm."
    flag = figures["vllm_max_lora_rank"]
    served = f"vLLM serves it with `--max-lora-rank {flag}`." if flag else "Its rank is beyond what vLLM serves."
    return [f"{exact} {served}"]


def _origins(source: Source, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    base = about["base"]
    rows = [
        ("base model", escaped(base["name"])),
        ("its type", escaped(base["model_type"])),
        ("SHA-256 over its weights", f"`{base['fingerprint']}`"),
    ]
    for part in ("method", "policy"):
        if part in source.made_by:
            settings = json.dumps(source.made_by.get(f"{part}_settings", {}), ensure_ascii=False)
            rows.append((part, f"{escaped(str(source.made_by[part]))}: {escaped(settings)}"))
    if source.beside:
        rows.append(("beside the weights", escaped(", ".join(source.beside))))
    return rows


def _damage(damage: Damage | None) -> list[str]:
    if damage is None or not (damage.after or damage.perplexity_after is not None):
        return ["Not measured."]
    parts = []
    # A protocol may need more than the facts say, such as their old answers.
    scored = [name for name, scores in damage.after.items() if any(score is not None for score in scores.values())]
    if scored:
        rows = [
            (escaped(protocol), model, *(_number(scores.get(protocol, {}).get(metric)) for metric in METRICS))
            for protocol in scored
            for model, scores in (("unedited", damage.before), ("edited", damage.after))
        ]
        parts += [
            "Means over the facts below. Locality compares with the unedited model's own answers to the facts' "
            "locality probes; a dash means that no fact has such a probe.",
            _table(("protocol", "model", *METRICS), rows),
        ]
    if damage.perplexity_after is not None:
        before, after = _number(damage.perplexity_before), _number(damage.perplexity_after)
        parts.append(
            f"Perplexity on {damage.tokens} tokens of {escaped(damage.text)}: {before} unedited, {after} edited."
        )
    return parts


def _facts(facts: Sequence[FactRecord]) -> list[str]:
    if not facts:
        return ["None recorded."]
    columns = ["#", "prompt", "answer now", "answer before", "by", "when", "source", "until"]
    protocol = next((name for fact in facts for name in fact.after), None)
    if protocol is not None:
        columns += ["reliability", "locality"]
    rows = []
    for number, fact in enumerate(facts, 1):
        edit = fact.edit
        cells = [str(number), *map(escaped, (edit.prompt, edit.target_new, edit.ground_truth or "", fact.by, fact.at))]
        cells += [_link(fact.source), escaped(fact.until)]
        if protocol is not None:
            cells += [_change(fact, protocol, metric) for metric in ("reliability", "locality")]
        rows.append([*cells, escaped(fact.name)])
    note = [] if protocol is None else [f"Scores are those of {escaped(protocol)}, unedited and edited."]
    return [*note, _table((*columns, "id"), rows)]


def _change(fact: FactRecord, protocol: str, metric: str) -> str:
    before, after = (_number(scores.get(protocol, {}).get(metric)) for scores in (fact.before, fact.after))
    return f"{before} → {after}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell or "–" for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
