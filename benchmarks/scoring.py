"""What scoring a thousand edits with three probes each costs, against the forward passes that their tokens need."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.table import Row
from everedit.data import load_edits
from everedit.edit import Edit
from everedit.evaluation import Evaluator
from everedit.models import LanguageModel

EDITS, PAIRS, TOKENS_AT_ONCE = 1000, 3, 2048
PROTOCOL = "wise/lifelong@1"


def thousand() -> list[Edit]:
    """Edits of the built-in facts, once as they are and once behind some words, each with three probes in all: the edit
    prompt, a paraphrase and an unrelated prompt.
    """
    facts = load_edits("worldfacts").edits
    plain = [edit.model_copy(update={"rephrase": edit.rephrase[:1], "locality": edit.locality[:1]}) for edit in facts]
    other = [edit.model_copy(update={"prompt": f"As is well known, {edit.prompt}"}) for edit in plain]
    return [*plain, *other][:EDITS]


@torch.no_grad()
def bare(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> None:
    """One pass over prompt and target of each pair, rows of like length together, logits where a target is read."""
    texts = sorted((lm.encode(*pair) for pair in pairs), key=lambda text: len(text.ids))
    while texts:
        rows = max(1, TOKENS_AT_ONCE // len(texts[0].ids))
        part, texts = texts[:rows], texts[rows:]
        batch = lm.pad([text.ids[:-1] for text in part])
        places = [(row, at - 1) for row, text in enumerate(part) for at in range(*text.target)]
        rows_at, columns = torch.tensor(places, device=lm.device).T
        lm.logits(lm.states(**batch.inputs())[rows_at, columns]).argmax(-1).tolist()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def scoring(lm: LanguageModel, edits: int = EDITS) -> Iterator[Row]:
    """Seconds of :meth:`Evaluator.score`, in turns with those of the bare passes."""
    chosen = thousand()[:edits]
    evaluator = Evaluator(lm, [PROTOCOL])
    pairs = list(dict.fromkeys(pair for edit in chosen for pair in evaluator.probes(edit)))
    baseline = evaluator.baseline(chosen)
    bare(lm, pairs[:64])
    timed = [
        (seconds(lambda: bare(lm, pairs)), seconds(lambda: evaluator.score(chosen, baseline))) for _ in range(PAIRS)
    ]
    plain, ours = (statistics.median(column) for column in zip(*timed, strict=True))
    ratio = statistics.median(one / other for one, other in timed)
    note = f"{len(chosen)} edits, {len(pairs)} texts, {PROTOCOL}; plain: one bare pass over each"
    yield Row("scoring against bare passes", plain, ours, "s", ratio, 1 / 1.5, note)
