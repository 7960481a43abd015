"""EasyEdit's ``BaseEditor`` on our editor: its arguments in, its nested metrics out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from everedit.compat.datasets import as_file, edits_of
from everedit.compat.hparams import HyperParams
from everedit.compat.metrics import protocol_of, quality, read_under
from everedit.compat.requests import as_request, edits_from_lists, edits_from_requests
from everedit.compat.rules import CompatibilityWarning, warn_unknown
from everedit.edit import Edit
from everedit.errors import EditError, ModelError
from everedit.evaluation import Evaluator
from everedit.experiments.config import RunConfig
from everedit.experiments.run import make_editor
from everedit.models import LanguageModel, load_model
from everedit.outcome import StreamState

__all__ = ["BaseEditor"]

Metrics = list[dict[str, Any]]
Weights = dict[str, Tensor] | Callable[[], None]

# Arguments of EasyEdit's that change nothing here, and why; switched off they would not change anything there either.
_IGNORED: Mapping[str, str] = {
    "test_generation": "fluency is no part of these metrics",
    "target_neg": "no method here reads it",
    "pre_file": "the unedited model is read anew",
    "pre_edit": "the unedited model is read anew",
    "metric_kwargs": "there is no metric for sentiment",
}


class BaseEditor:
    """Edits one model with the method that some hyper-parameters name.

    ``model`` is a plain transformers model and ``tok`` its tokenizer; ``editor`` is the :class:`everedit.Editor` that
    does the work.
    """

    def __init__(self, hparams: HyperParams) -> None:
        config = hparams.run_config()
        self.hparams = hparams
        self.alg_name = hparams.algorithm.name
        self.editor = make_editor(_loaded(hparams, config), config)
        self.lm = self.editor.lm
        self.model: PreTrainedModel = self.lm.model
        self.tok = self.lm.tokenizer
        self.model_name = self.lm.name
        self._batch = config.batch
        # Where edits that stay have led to; those that are made one by one are taken back to here.
        self._kept = self.editor.state()

    @classmethod
    def from_hparams(cls, hparams: HyperParams) -> Self:
        """Load the model that the hyper-parameters name, and return an editor for it.

        Raises an :class:`everedit.errors.EvereditError` that names the hyper-parameter which will not do.
        """
        return cls(hparams)

    def edit(
        self,
        prompts: Sequence[str] | str,
        target_new: Sequence[str] | str,
        ground_truth: Sequence[str | None] | str | None = None,
        *,
        subject: Sequence[str] | str | None = None,
        rephrase_prompts: Sequence[Any] | str | None = None,
        locality_inputs: Mapping[str, Any] | None = None,
        portability_inputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Metrics, PreTrainedModel, Weights]:
        """Make each edit and return metrics, the edited model and the weights that were there before.

        ``sequential_edit=True`` makes one edit after another on the same model; otherwise each is made on the model as
        it was before, and the last one is what the returned model holds. ``keep_original_weight``, as earlier versions
        had it, is the opposite. Further ``options`` are ``loc_prompts``, ``train_ds`` and ``eval_metric``; one that
        changes nothing here gets a warning. The weights are a mapping by parameter name; of memories they are a
        function that takes the edits back.

        Raises an :class:`everedit.errors.EvereditError`, before anything is changed, that names the argument.
        """
        edits = edits_from_lists(
            prompts,
            target_new,
            ground_truth,
            subject=subject,
            rephrase_prompts=rephrase_prompts,
            locality_inputs=locality_inputs,
            portability_inputs=portability_inputs,
        )
        return self._run(edits, 1, **options)

    def batch_edit(
        self, prompts: Sequence[str], target_new: Sequence[str], ground_truth: Any = None, **options: Any
    ) -> tuple[Metrics, PreTrainedModel, Weights]:
        """As :meth:`edit`, ``hparams.batch_size`` edits together; each batch on the model as it was before, unless
        ``sequential_edit`` is set.

        Raises :class:`everedit.errors.NotApplicable` if the method makes one edit at a time.
        """
        named = ("subject", "rephrase_prompts", "locality_inputs", "portability_inputs")
        lists = {name: options.pop(name, None) for name in named}
        self.editor.require_batches(self._batch)
        return self._run(edits_from_lists(prompts, target_new, ground_truth, **lists), self._batch, **options)

    def edit_requests(
        self, requests: Iterable[Mapping[str, Any]], sequential_edit: bool = False, verbose: bool = True, **options: Any
    ) -> tuple[Metrics, PreTrainedModel, Weights]:
        """As :meth:`edit`, from request dictionaries: EasyEdit's, ROME's and MEMIT's, or whole CounterFact records."""
        return self._run(edits_from_requests(requests), 1, sequential_edit=sequential_edit, **options)

    def edit_dataset(self, ds: Iterable[Any], **options: Any) -> tuple[Metrics, PreTrainedModel, Weights]:
        """As :meth:`edit`, for the records of a data set."""
        return self._run(edits_of(ds, "ds"), 1, **options)

    def _run(
        self,
        edits: list[Edit],
        batch: int,
        *,
        sequential_edit: bool | None = None,
        keep_original_weight: bool | None = None,
        eval_metric: str | None = None,
        loc_prompts: Sequence[str] | str | None = None,
        train_ds: Iterable[Any] | None = None,
        **options: Any,
    ) -> tuple[Metrics, PreTrainedModel, Weights]:
        for name, value in options.items():
            if name in _IGNORED and value:
                message = f"the argument {name} changes nothing: {_IGNORED[name]}"
                warnings.warn(message, CompatibilityWarning, stacklevel=3)
            elif name not in (*_IGNORED, "verbose"):
                warn_unknown("argument", name, [*_IGNORED, "loc_prompts", "train_ds", "eval_metric"], "edit", depth=4)
        stays = _stays(sequential_edit, keep_original_weight)
        asked = self.hparams.translation().settings.get("protocol", "exact match")
        protocol = protocol_of(asked if eval_metric is None else eval_metric)
        self._give_texts(len(edits), loc_prompts, train_ds)
        evaluator = Evaluator(self.lm, [read_under(protocol)])
        self._check(edits, evaluator)
        before = self._kept
        self.editor.load_state(before)
        try:
            metrics = self._edited(edits, batch, stays, evaluator, protocol)
        except BaseException:
            self.editor.load_state(before)
            raise
        weights = self._weights(before)
        if stays:
            self._kept = self.editor.state()
        return metrics, self.model, weights

    def _edited(self, edits: list[Edit], batch: int, stays: bool, evaluator: Evaluator, protocol: str) -> Metrics:
        before = self.editor.state()
        with self.editor.unedited():
            base = evaluator.baseline(edits)

        def measured(some: Sequence[Edit], scored: str) -> list[dict[str, Any]]:
            now = evaluator.answers(some, base)
            return [quality(edit, now, base.answers, protocol, scored) for edit in some]

        pre = measured(edits, "before the edits")
        rows: Metrics = []
        for start in range(0, len(edits), batch):
            if not stays:
                self.editor.load_state(before)
            part = edits[start : start + batch]
            began = time.perf_counter()
            self.editor.edit(part, score=False)
            spent = time.perf_counter() - began
            for edit, post in zip(part, measured(part, "right after the edit"), strict=True):
                row = {"pre": pre[len(rows)], "case_id": len(rows), "requested_rewrite": as_request(edit)}
                rows.append({**row, "time": spent, "post": post})
        if stays:
            for row, final in zip(rows, measured(edits, "after all edits"), strict=True):
                row["final"] = final
        return rows

    def _check(self, edits: Sequence[Edit], evaluator: Evaluator) -> None:
        method = self.editor.method
        for index, edit in enumerate(edits):
            if method.traits.needs_subject and edit.subject is None:
                raise EditError(
                    what=f"{method.name} needs the subject of every prompt, and prompts[{index}] has none",
                    where="subject",
                    fix="give subject=[…], each as it stands in its prompt",
                )
            self.editor.check(edit)
            evaluator.check(edit)

    def _give_texts(self, n: int, loc_prompts: Sequence[str] | str | None, train_ds: Iterable[Any] | None) -> None:
        """Let the method take its unrelated texts from ``loc_prompts``, its demonstrations from ``train_ds``."""
        config = self.editor.method.config
        given: dict[str, Any] = {}
        if loc_prompts is not None and "irrelevant" in type(config).model_fields:
            given = {"irrelevant": str(as_file(_unrelated(loc_prompts, n))), "irrelevant_path": None}
        if train_ds is not None and "demonstrations" in type(config).model_fields:
            pool = as_file(edits_of(train_ds, "train_ds"))
            given = {"demonstrations": str(pool), "demonstrations_path": None}
        if given:
            self.editor.method = type(self.editor.method)(config.model_copy(update=given))

    def _weights(self, before: StreamState) -> Weights:
        """Return what was there ``before``: changed weights by name, or a function that takes memories back."""
        if self.editor.method.traits.changes != "weights":
            return lambda: self._go_back(before)
        after = self.editor.state()
        self.editor.load_state(before)
        found = {name: self.model.get_parameter(name).detach().clone() for name in after.weights.masters}
        self.editor.load_state(after)
        return found

    def _go_back(self, state: StreamState) -> None:
        self.editor.load_state(state)
        self._kept = state


def _loaded(hparams: HyperParams, config: RunConfig) -> LanguageModel:
    model = hparams.to_dict().get("model_name")
    if model is None:
        raise EditError(
            what="the hyper-parameters name no model",
            where="model_name",
            fix="set model_name to an alias (everedit models ls), a folder, a hub id, or a loaded (model, tokenizer)",
        )
    if isinstance(model, tuple):
        return LanguageModel(config.model, *model)
    try:
        return load_model(config.model, device=config.device, dtype=config.dtype)
    except ModelError as error:
        raise ModelError(
            what=f"model_name: {error.what}",
            where=error.where,
            fix=f"{error.fix}; model_name is an alias (everedit models ls), a folder or a hub id",
        ) from error


def _stays(sequential_edit: bool | None, keep_original_weight: bool | None) -> bool:
    """Whether one edit is made after another on the same model."""
    if sequential_edit and keep_original_weight:
        raise EditError(
            what="sequential_edit and keep_original_weight contradict each other: edits stay, or they do not",
            where="keep_original_weight",
            fix="leave keep_original_weight out",
        )
    return keep_original_weight is False if sequential_edit is None else sequential_edit


def _unrelated(loc_prompts: Sequence[str] | str, n: int) -> list[Edit]:
    """Return unrelated texts as records of a pool, whose answer is a text's last word."""
    texts = [loc_prompts] if isinstance(loc_prompts, str) else list(loc_prompts)
    if not 0 < len(texts) <= n:
        raise EditError(
            what=f"loc_prompts has {len(texts)} entries and prompts has {n}",
            where="loc_prompts",
            fix="give one text for each prompt, or fewer, which are then taken in turn",
        )
    parts = [text.strip().rpartition(" ") for text in texts]
    return [
        Edit.parse({"prompt": start, "target_new": last}, where=f"loc_prompts[{index}]: a text of two words or more")
        for index, (start, _, last) in enumerate(parts)
    ]
