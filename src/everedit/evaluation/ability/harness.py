"""Tasks of the lm-eval harness, through the harness itself, on a model as it is in memory, edits and all.

Biderman et al., "Lessons from the Trenches on Reproducible Evaluation of Language Models", 2024. The library makes the
prompts and the figures; what the model says to them comes from the readers that score edits, so that a memory beside
the weights, or one that rewrites prompts, answers here as it does everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from everedit.errors import EvereditError, near_names
from everedit.evaluation.ability._base import Measured
from everedit.evaluation.read import Reading, line_breaks, read, read_ids
from everedit.models import LanguageModel

__all__ = ["Harness", "harness_model"]

_NEW_TOKENS = 256
_ROWS = 16


class Harness:
    """Some tasks of lm-eval, found and loaded once.

    Raises :class:`EvereditError` if the library is not installed, a name is not known to it, or a task's data cannot be
    had.
    """

    def __init__(self, names: Sequence[str], limit: int, include_path: Path | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise EvereditError(what="lm-eval is not installed", fix="pip install 'everedit[lm-eval]'") from error
        self.names, self.limit = list(names), limit
        with _quiet():
            own = str(include_path) if include_path else None
            # The library's own thousands of tasks take seconds to list.
            self._manager = TaskManager(include_path=own, include_defaults=False)
            if not {*names} <= {*self._manager.all_tasks}:
                self._manager = TaskManager(include_path=own)
            for name in names:
                if name not in self._manager.all_tasks:
                    raise near_names("lm-eval task", name, self._manager.all_tasks)
            with _told("the data of an lm-eval task cannot be had"):
                self._manager.load(self.names)

    def measure(self, lm: LanguageModel, seed: int = 0) -> Iterator[Measured]:
        """Yield the figures of a model as it is now; a group's name gives one row for each of its tasks.

        Intervals are two standard errors to each side, as the library states them.
        """
        from lm_eval import simple_evaluate

        with _quiet(), _told("lm-eval cannot measure this model"):
            # Seeds of None: the process's own random state is not the library's to set.
            result = simple_evaluate(
                model=harness_model(lm), tasks=self.names, task_manager=self._manager, limit=self.limit,
                bootstrap_iters=1000, log_samples=False, random_seed=None, numpy_random_seed=None,
                torch_random_seed=None, fewshot_random_seed=seed,
            )  # fmt: skip
        for name, row in result["results"].items():
            figures = {_metric(key): float(value) for key, value in row.items() if _is_figure(key, value)}
            errors = {_metric(key): value for key, value in row.items() if "_stderr" in key}
            spans = {name: errors.get(f"{name}_stderr") for name in figures}
            intervals = {
                metric: (figures[metric] - 2 * span, figures[metric] + 2 * span) if isinstance(span, float) else None
                for metric, span in spans.items()
            }
            samples = result.get("n-samples", {}).get(name, {})
            label = f"lm-eval/{name}@{result.get('versions', {}).get(name, '?')}"
            yield Measured(label, int(samples.get("effective", 0)), 0, dict(figures), intervals)


def _metric(key: str) -> str:
    """The library's "acc,none" is acc; "exact_match,strict-match" keeps the name of its filter."""
    name, _, rest = key.partition(",")
    return name if rest in ("", "none") else f"{name},{rest}"


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key and "_stderr" not in key


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what a task's own code or data raises into one clear error."""
    try:
        yield
    except EvereditError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise EvereditError(
            what=f"{what}: {type(error).__name__}: {reason}", fix="check the network, or leave the task out"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's notes to warnings while the block runs."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def harness_model(lm: LanguageModel) -> Any:
    """Return ``lm`` as lm-eval sees a model: it keeps the library's own way to cut texts into tokens."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class EditedModel(TemplateLM):
        backend = "causal" if lm.layout.is_decoder_only else "seq2seq"
        tokenizer = lm.tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(lm.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            start = lm.tokenizer.bos_token_id
            return int(start if start is not None else self.eot_token_id)

        @property
        def tokenizer_name(self) -> str:
            return lm.name.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            started = string.startswith(lm.tokenizer.decode(self.prefix_token_id))
            special = not started if add_special_tokens is None else add_special_tokens
            ids = list(lm.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])
            # An encoder-decoder's end token is put there where the model reads.
            ends = ids and not lm.layout.is_decoder_only and ids[-1] == lm.tokenizer.eos_token_id
            return ids[:-1] if ends else ids

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                lm.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            if lm.redirect is None:
                # The library's own cut where a text is too long: its end is kept.
                room = lm.context_tokens + 1
                rows = [(tuple(begun[-(room - len(target)) :]), tuple(target)) for _, begun, target in requests]
                return [_said(reading) for reading in read_ids(lm, rows)]
            pairs = [(context.rstrip(), continuation) for (context, continuation), _, _ in requests]
            return [_said(reading) for reading in read(lm, pairs)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            rows: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
            owners: list[int] = []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, lm.context_tokens, 1):
                    begun, target = utils.make_disjoint_window(window)
                    rows.append((tuple(begun), tuple(target)))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, reading in zip(owners, read_ids(lm, rows), strict=True):
                totals[owner] += _said(reading)[0]
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return list(_written(lm, [request.args for request in requests]))

    return EditedModel()


def _said(reading: Reading) -> tuple[float, bool]:
    return -reading.nll * len(reading.target), reading.predicted == reading.target


def _written(lm: LanguageModel, requests: Sequence[tuple[str, dict[str, Any]]]) -> Iterable[str]:
    """Return the greedy text behind each context, up to the first of its stop texts."""
    found: dict[int, str] = {}
    plans = []
    for number, (context, settings) in enumerate(requests):
        if settings.get("do_sample") and settings.get("temperature", 1.0):
            raise EvereditError(
                what="this lm-eval task draws its texts at random", fix="choose one that writes greedily"
            )
        until = settings.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        plans.append((int(settings.get("max_gen_toks", _NEW_TOKENS)), stops, number, _shortened(lm, context, settings)))
    plans.sort(key=lambda plan: (plan[0], plan[1], len(plan[3])))
    breaks = line_breaks(lm)
    while plans:
        room, stops = plans[0][:2]
        part = [plan for plan in plans[:_ROWS] if plan[:2] == (room, stops)]
        plans = plans[len(part) :]
        # Where a line break ends a text, the model need not write past it; other stops are looked for afterwards.
        texts = lm.generate([plan[3] for plan in part], max_new_tokens=room, stop_ids=breaks if "\n" in stops else [])
        for plan, text in zip(part, texts, strict=True):
            for stop in stops:
                text = text.partition(stop)[0] if stop else text
            found[plan[2]] = text
    return (found[number] for number in range(len(requests)))


def _shortened(lm: LanguageModel, context: str, settings: dict[str, Any]) -> str:
    """Return a context without its beginning where it would leave no room for what is to be written."""
    room = lm.context_tokens - int(settings.get("max_gen_toks", _NEW_TOKENS))
    ids = lm.tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
    kept = max(1, room - 1)
    return context if len(ids) <= kept else str(lm.tokenizer.decode(ids[-kept:]))
