"""Plain-language sentences of the report: what a protocol counts, and what a run came to."""

from __future__ import annotations

from everedit.report.results import ProtocolResult, Scores

METRIC_MEANINGS = {
    "reliability": "the edited question itself",
    "generalization": "the same question in other words",
    "locality": "unrelated questions, whose answers should stay as they were",
    "portability": "questions whose answer follows from the new fact",
}

# How methods and policies are written in print; a label of a user's own is not here, and stays as it is.
_PRINTED = {
    **{name: name.upper() for name in (
        "emmet", "ft", "ft-l", "ft-m", "grace", "ike", "ke", "kn", "malmen", "memit", "memoir", "mend", "nas", "pmet",
        "prune", "r-rome", "rect", "rome", "serac", "wise",
    )},
    "alphaedit": "AlphaEdit",
    "calinet": "CaliNet",
    "lora": "LoRA",
    "marginalia": "Marginalia",
    "rlsedit": "RLSEdit",
    "simie": "SimIE",
    "t-patcher": "T-Patcher",
    "ultraedit": "UltraEdit",
    "wilke": "WilKE",
}  # fmt: skip
_EXPLANATIONS = {
    "probability-comparison": (
        "An answer counts as right when the model finds it more probable than the competing answer. "
        "The model need not be likely to write it."
    ),
    "teacher-forced/token-accuracy": (
        "The right answer is fed to the model token by token; the score is the share of its tokens that "
        "the model ranks first. A wrong token is corrected before the next one is asked "
        "for, so scores run higher than in free use."
    ),
    "teacher-forced/all-tokens": (
        "The right answer is fed to the model token by token, and it counts only if the model ranks every "
        "one of its tokens first."
    ),
    "free-generation/exact-match": (
        "The model writes its own answer, and it counts only if it is the expected one. "
        "This is closest to how a model is used."
    ),
}

# No shares: perplexities, losses and entropies.
_PLAIN = ("perplexity", "perplexity_median", "held_out_loss", "fluency")

# From the strictest protocol to the most lenient: the headline uses the strictest one measured.
# In the first three an edit is either right or wrong, so that a share can be told as a count.
_HEADLINES = {
    "free-generation/exact-match": ("writes", "writing its own answer"),
    "teacher-forced/all-tokens": ("ranks first every token of", "fed the answer token by token"),
    "probability-comparison": ("prefers", "comparing the probabilities of two answers"),
    "teacher-forced/token-accuracy": ("ranks first", "fed the answer token by token"),
}


def printed(name: str) -> str:
    """Return how a method, or policies joined by ``+``, are written in print."""
    return " + ".join(_PRINTED.get(part, part) for part in name.split("+"))


def explain(protocol: str, own: str = "") -> str:
    """Return one or two sentences on what the protocol counts; of one not known here, the run's ``own``."""
    known = _EXPLANATIONS.get(_family(protocol)) or (own and f"{own[:1].upper()}{own[1:]}.")
    return known or "This version of the report has no description of this protocol."


def score_text(metric: str, value: float | None) -> str:
    """Return a score as it is read: a percentage, or a plain number for what is no share."""
    return f"{value:,.3g}" if metric in _PLAIN and value is not None else percent(value)


def percent(value: float | None) -> str:
    """Return a score between 0 and 1 as a percentage with one decimal, or a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}%"


def headline(results: list[ProtocolResult]) -> str:
    """Return the run's result in one sentence, from the strictest protocol that was measured."""
    result = _strictest(results)
    if result is None:
        return _plain_headline(results)
    n = result.last_checkpoint
    if result.single:
        n = max(result.immediate_at)
        right = _count(result, n, result.immediate_at[n].get("reliability"))
        return f"Of {_edits(n)}, each made by itself, the model {_HEADLINES[_family(result.name)][0]} {right}."
    if n is None:
        n = max(result.immediate_at)
        return f"After {_edits(n)} no checkpoint has been reached yet, so nothing is known about retention."
    retained, immediate = result.retained_at[n], result.immediate_at.get(n, {})
    now = _count(result, n, retained.get("reliability"))
    sentence = f"After {_edits(n)} the model still {_HEADLINES[_family(result.name)][0]} {now}"
    then = immediate.get("reliability")
    if then is not None:
        sentence += f"; right after each edit it was {_count(result, n, then, short=True)}"
    return sentence + "."


def _plain_headline(results: list[ProtocolResult]) -> str:
    """Return the result under a protocol that none of the usual sentences fits: its first score, as a number."""
    first = next((result for result in results if result.last_checkpoint is not None), None)
    if first is None or first.last_checkpoint is None:
        return "No edit of this run has been measured yet."
    n, metric = first.last_checkpoint, first.metrics[0]
    now, before = (score_text(metric, scores.get(metric)) for scores in (first.retained_at[n], first.unedited))
    return f"After {_edits(n)} {metric.replace('_', ' ')} is {now}; before editing it was {before}."


def subline(results: list[ProtocolResult]) -> str:
    """Return the sentence below the headline: how it was measured and what happened to the rest."""
    result = _strictest(results)
    if result is None or result.last_checkpoint is None:
        return ""
    retained = result.retained_at[result.last_checkpoint]
    sentence = f"Measured {_HEADLINES[_family(result.name)][1]} ({result.name})."
    return sentence + _other_scores(result.unedited, retained)


def _other_scores(unedited: Scores, retained: Scores) -> str:
    parts = []
    if (locality := retained.get("locality")) is not None:
        before = unedited.get("locality")
        change = f" ({percent(before)} before editing)" if before is not None else ""
        parts.append(f"{percent(locality)} on unrelated questions{change}")
    if (general := retained.get("generalization")) is not None:
        parts.append(f"{percent(general)} on rephrased questions")
    return f" It scores {' and '.join(parts)}." if parts else ""


def _family(protocol: str) -> str:
    return protocol.split("@", 1)[0]


def _strictest(results: list[ProtocolResult]) -> ProtocolResult | None:
    """Return the strictest protocol with a reliability, preferring those with retained scores."""
    families = {_family(result.name): result for result in reversed(results)}
    ranked = [families[family] for family in _HEADLINES if family in families]
    for result in ranked:
        n = result.last_checkpoint
        if n is not None and result.retained_at[n].get("reliability") is not None:
            return result
    return next((result for result in ranked if result.immediate_at), None)


def _edits(n: int) -> str:
    return "1 edit" if n == 1 else f"{n:,} edits"


def _count(result: ProtocolResult, n: int, rate: float | None, *, short: bool = False) -> str:
    """Return e.g. '47 of the 50 new answers', or a percentage where a count would be a guess."""
    if rate is None:
        return "an unknown share of the new answers"
    total = result.measured.get(n, 0)
    right = rate * total
    by_tokens = _family(result.name) == "teacher-forced/token-accuracy"
    # Rates of whole answers come back to whole numbers; if not, the rate was not taken over these edits.
    if total and not by_tokens and abs(right - round(right)) < 1e-6 * max(1, total):
        if short:
            return f"{round(right):,}"
        return f"{round(right):,} of the {total:,} new answers" if total > 1 else f"{round(right)} of 1 new answer"
    if short:
        return percent(rate)
    return f"{percent(rate)} of the {'tokens of the ' if by_tokens else ''}new answers"
