"""The training loop: batches in an order fixed by the seed, validation, early stopping, checkpoints; resumable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everedit._version import __version__
from everedit.cache import file_sha256
from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.learner import Learner
from everedit.errors import EditError, EvereditError, NumericalError
from everedit.methods._trained import TrainedMethod
from everedit.models import load_model
from everedit.reporting import Reporter, Silent
from everedit.training.config import TrainConfig
from everedit.training.folder import TrainFolder

__all__ = ["Trainer", "resume", "train"]

Figures = dict[str, float]


def train(config: TrainConfig, out: Path, *, reporter: Reporter | None = None, command: str = "") -> dict[str, Any]:
    """Train a method's networks into the new folder ``out`` and return the card of the best ones.

    Raises :class:`EvereditError` before anything is computed if the config, the data or the folder will not do, and
    :class:`NumericalError` if a loss is not finite: the batch stands in ``offending_batch.jsonl``.
    """
    trainer = Trainer.of(config.resolved(), reporter or Silent())
    folder = TrainFolder.create(out)
    folder.write_config({"training": trainer.config.model_dump(mode="json"), "command": command})
    return trainer.run(folder)


def resume(out: Path, *, reporter: Reporter | None = None) -> dict[str, Any]:
    """Go on with the training in ``out`` where it was saved last; it ends as if it had never been interrupted."""
    folder = TrainFolder.open(out)
    trainer = Trainer.of(TrainConfig.model_validate(folder.config()["training"]), reporter or Silent())
    return trainer.run(folder)


@dataclass
class Trainer:
    """A training that is ready to run. The passes count from 1; ``best`` is the lowest validation loss so far."""

    config: TrainConfig
    reporter: Reporter
    editor: Editor
    learner: Learner
    examples: Sequence[Edit]
    held_out: Sequence[Edit]
    source: dict[str, Any]
    best: float = float("inf")
    best_step: int = 0
    running: Figures = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, config: TrainConfig, reporter: Reporter) -> Trainer:
        """Load model and data, and make the untrained networks."""
        reporter.stage(f"loading {config.model}")
        lm = load_model(config.model, device=config.device, dtype=config.dtype)
        editor = Editor(lm, config.method, method_settings=config.method_settings, seed=config.seed)
        method = editor.method
        assert isinstance(method, TrainedMethod)
        loaded = load_edits(config.data, config.data_path, keep_contradictions=True)
        source = {"name": loaded.name, "path": str(loaded.path), "sha256": file_sha256(loaded.path)}
        examples = [edit for edit in loaded.edits if _fits(editor, method, edit)]
        if config.validation is not None:
            other = load_edits(config.validation, config.validation_path, keep_contradictions=True)
            held_out = [edit for edit in other.edits if _fits(editor, method, edit)][: config.held_out]
        else:
            held_out, examples = examples[-config.held_out :], examples[: -config.held_out]
        if not examples or not held_out:
            raise EditError(
                what=f"the data has too few records that {config.method} can be trained on",
                where=str(loaded.path),
                fix="each needs a prompt, a target and a locality probe, and held_out of them are not trained on",
            )
        learner = method.learner(editor.bench)
        return cls(config, reporter, editor, learner, examples, held_out, {**source, "examples": len(examples)})

    def batch(self, step: int) -> list[Edit]:
        """Return the examples of a pass: each epoch in an order of its own, drawn from seed and epoch alone."""
        size = min(self.config.batch or 1, len(self.examples))
        passes = max(1, len(self.examples) // size)
        epoch, place = divmod(step - 1, passes)
        random = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.examples), generator=random)[place * size : (place + 1) * size]
        return [self.examples[index] for index in order.tolist()]

    def run(self, folder: TrainFolder) -> dict[str, Any]:
        """Train from where the folder stands to the end and return the best networks' card."""
        config, learner = self.config, self.learner
        assert config.steps is not None
        assert config.check_every is not None
        assert config.patience is not None
        accelerator = _accelerator(self.editor.lm.device)
        optimiser = learner.optimiser()
        self.rates = [group["lr"] for group in optimiser.param_groups]
        done = self._go_back(folder, optimiser)
        network, prepared = accelerator.prepare(learner, optimiser)
        self.reporter.stage(f"training {config.method}", config.steps)
        for step in range(done + 1, config.steps + 1):
            if self.best_step and step - 1 - self.best_step >= config.patience:
                break
            self._pass(accelerator, network, prepared, step, folder)
            if step % config.check_every == 0 or step == config.steps:
                self._validate(folder, step)
                folder.save_progress(learner, optimiser, self._values(step))
            self.reporter.step(step, " ".join(f"{name} {value:.3f}" for name, value in self.running.items()))
        if not self.best_step:
            raise EditError(what="nothing was trained", where=str(folder.path), fix="give more steps")
        return folder.card()

    def _go_back(self, folder: TrainFolder, optimiser: torch.optim.Optimizer) -> int:
        values = folder.load_progress(self.learner, optimiser)
        done = int(values.get("step", 0))
        folder.keep_metrics(done)
        self.best, self.best_step = values.get("best", float("inf")), int(values.get("best_step", 0))
        self.running = values.get("running", {})
        return done

    def _values(self, step: int) -> dict[str, Any]:
        return {"step": step, "best": self.best, "best_step": self.best_step, "running": self.running}

    def _pass(self, accelerator: Any, network: Any, optimiser: Any, step: int, folder: TrainFolder) -> None:
        config, batch = self.config, self.batch(step)
        network.train()
        with torch.enable_grad():
            loss, figures = network(batch)
            self._require_finite(loss, batch, step, folder)
            accelerator.backward(loss / (config.accumulation or 1))
        if step % (config.accumulation or 1) == 0:
            if config.clip is not None:
                accelerator.clip_grad_norm_(self.learner.parameters(), config.clip)
            for group, rate in zip(optimiser.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.learner.rate(step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self.learner.after_step()
        for name, value in figures.items():
            self.running[name] = value if name not in self.running else 0.98 * self.running[name] + 0.02 * value
        folder.append({"step": step, "kind": "train", **figures})

    def _require_finite(self, loss: Tensor, batch: Sequence[Edit], step: int, folder: TrainFolder) -> None:
        if bool(torch.isfinite(loss.detach())):
            return
        file = folder.path / "offending_batch.jsonl"
        rows = (json.dumps(edit.model_dump(mode="json", exclude_defaults=True)) for edit in batch)
        file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        raise NumericalError(
            what=f"the loss is not finite at step {step}; the batch is in {file.name}",
            where=str(folder.path),
            fix="look at the batch, or lower the learning rate (method.lr); what was saved last is intact",
        )

    def _validate(self, folder: TrainFolder, step: int) -> None:
        self.learner.eval()
        size = self.config.batch or 1
        total: Figures = {}
        for start in range(0, len(self.held_out), size):
            part = self.held_out[start : start + size]
            # Inner gradients are taken; the outer ones are not.
            with torch.no_grad():
                _, figures = self.learner(part)
            for name, value in figures.items():
                total[name] = total.get(name, 0.0) + value * len(part) / len(self.held_out)
        folder.append({"step": step, "kind": "validation", **total})
        self.learner.after_validation(total)
        if total["loss"] < self.best:
            self.best, self.best_step = total["loss"], step
            folder.save_best(self.learner, self._card(step, total))

    def _card(self, step: int, figures: Figures) -> dict[str, Any]:
        return {
            "method": self.config.method,
            "model": self.editor.lm.fingerprint,
            "model_name": self.config.model,
            "settings": self.editor.method.config.model_dump(mode="json"),
            "training": self.config.model_dump(mode="json"),
            "data": self.source,
            "step": step,
            "validation": figures,
            "everedit": __version__,
            "torch": torch.__version__,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _accelerator(device: torch.device) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise EvereditError(
            what="training needs the library accelerate", fix="pip install 'everedit[train]'"
        ) from error
    return Accelerator(cpu=device.type == "cpu")


def _fits(editor: Editor, method: TrainedMethod, edit: Edit) -> bool:
    try:
        method.check_example(editor.bench, edit)
    except EvereditError:
        return False
    return True
