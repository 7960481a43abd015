"""Gates: what a model must still be and do after an edit for the edit to stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from everedit.edit import Edit
from everedit.errors import EditRefused
from everedit.evaluation.read import Reading, read
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.outcome import Commit

__all__ = ["Finding", "Gates", "GatesConfig", "canary", "held_by", "read_perplexity"]

_RECENT = 50


class GatesConfig(BaseModel):
    """What an edit must not do. A gate that is set to null (or, where it says so, false) is off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    finite: bool = Field(True, description="changed weights and the canary's losses are finite numbers")
    perplexity: float | None = Field(
        1.5, gt=1, description="most perplexity on the canary text, as a multiple of the unedited model's"
    )
    norm: float | None = Field(10.0, gt=1, description="largest change, as a multiple of the median of recent ones")
    norm_after: int = Field(5, ge=1, description="how many edits must have been made before norms are judged")
    lost: float | None = Field(
        0.25, ge=0, lt=1, description="most of a sample of earlier edits that may be lost by one edit"
    )
    sample: int = Field(16, ge=1, description="size of that sample; fewer than four edits are not judged")
    took: float | None = Field(0.9, gt=0, le=1, description="share of the commit's own edits that the model must say")
    passes: int = Field(
        3, ge=1, description="how often an edit of weights that does not take is made, on top of itself, in one commit"
    )


@dataclass(frozen=True)
class Finding:
    """What a gate measured, the bound it was held against, and whether it passed."""

    gate: str
    value: float
    bound: float
    passed: bool

    def __str__(self) -> str:
        """The finding in words."""
        return f"{_WORDS[self.gate]}: {self.value:.6g}, allowed {self.bound:.6g}"


_WORDS = {
    "finite": "values that are not finite",
    "perplexity": "perplexity on the canary text, as a multiple of the unedited model's",
    "norm": "size of the change, as a multiple of the recent median",
    "lost": "share of a sample of earlier edits that was lost",
    "took": "share of its own edits that the model says",
}


def canary() -> list[tuple[str, str]]:
    """Return the canary text: beginnings of everyday sentences with their ends, in our own words."""
    text = files("everedit").joinpath("canary.txt").read_text(encoding="utf-8")
    pairs = [line.split(" | ") for line in text.splitlines() if line]
    return [(begin, end) for begin, end in pairs]


def read_perplexity(readings: Sequence[Reading]) -> float:
    """Return the perplexity of all read tokens together; infinite where it is too large for a number."""
    tokens = sum(len(reading.target) for reading in readings)
    mean = sum(reading.nll * len(reading.target) for reading in readings) / tokens
    return math.exp(mean) if mean < 700 else (mean if math.isnan(mean) else math.inf)


def held_by(lm: LanguageModel, edits: Sequence[Edit]) -> list[bool]:
    """Return of each edit whether its target, token by token, is the model's first choice behind its prompt."""
    found = read(lm, [(edit.prompt, edit.target_new) for edit in edits])
    return [reading.predicted == reading.target for reading in found]


class Gates:
    """The gates of one living model. ``base`` is the unedited model's perplexity on the canary text."""

    def __init__(self, config: GatesConfig, lm: LanguageModel, base: float) -> None:
        self.config, self.lm, self.base = config, lm, base

    @classmethod
    def measured_on(cls, lm: LanguageModel, config: GatesConfig) -> Gates:
        """Return the gates of a model that is unedited now."""
        return cls(config, lm, read_perplexity(read(lm, canary())))

    def check(self, commit: Commit, norms: Sequence[float], sample: Sequence[Edit]) -> dict[str, Any]:
        """Return what was measured on the model with ``commit`` made.

        ``norms`` are those of recent changes, the newest first; ``sample`` are earlier edits that the model held just
        before. Raises :class:`EditRefused` with all figures at the first gate that does not pass.
        """
        findings = list(self._findings(commit, norms, sample))
        figures = {finding.gate: finding.value for finding in findings}
        for finding in findings:
            if not finding.passed:
                raise EditRefused(
                    what=f"the edit did not pass the gate '{finding.gate}' ({finding}); the model is as before",
                    where=commit.edits[0].prompt,
                    fix=_FIXES[finding.gate],
                    figures=figures,
                )
        return figures

    def _findings(self, commit: Commit, norms: Sequence[float], sample: Sequence[Edit]) -> list[Finding]:
        config, found = self.config, list[Finding]()
        if config.finite or config.perplexity is not None:
            readings = read(self.lm, canary())
            if config.finite:
                bad = sum(not math.isfinite(reading.nll) for reading in readings) + self._broken(commit)
                found.append(Finding("finite", bad, 0, bad == 0))
            if config.perplexity is not None:
                ratio = read_perplexity(readings) / self.base
                found.append(Finding("perplexity", ratio, config.perplexity, ratio <= config.perplexity))
        recent = norms[:_RECENT]
        if config.norm is not None and len(recent) >= config.norm_after and median(recent) > 0:
            ratio = commit.norm / median(recent)
            found.append(Finding("norm", ratio, config.norm, ratio <= config.norm))
        if config.lost is not None and len(sample) >= 4:
            lost = held_by(self.lm, sample).count(False) / len(sample)
            found.append(Finding("lost", lost, config.lost, lost <= config.lost))
        if config.took is not None:
            share = self._said(commit.edits)
            found.append(Finding("took", share, config.took, share >= config.took))
        return found

    def took(self, edits: Sequence[Edit]) -> bool:
        """Whether edits pass the gate of that name, on the model as it is."""
        return self.config.took is None or self._said(edits) >= self.config.took

    def _said(self, edits: Sequence[Edit]) -> float:
        return held_by(self.lm, edits).count(True) / len(edits)

    def _broken(self, commit: Commit) -> int:
        weights = [oriented(self.lm.layout.module_of(name)) for name in commit.patch.deltas]
        return sum(not bool(torch.isfinite(weight).all()) for weight in weights)


_FIXES = {
    "finite": "use a smaller step: --on-refusal retry, or the method's settings",
    "perplexity": "use a smaller step (--on-refusal retry), another method, or raise gates.perplexity in config.yaml",
    "norm": "look at the edit: it asks for much more than others; or raise gates.norm in config.yaml",
    "lost": "look for conflicts (everedit conflicts), or raise gates.lost in config.yaml",
    "took": "say it in other words, give the subject, or lower gates.took in config.yaml",
}
