"""A training's folder: config, figures by step, all that resuming needs, the best networks so far, and their card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everedit.cache import write_json
from everedit.engine.learner import Learner
from everedit.errors import CacheError, EditError
from everedit.patch import load_tensors, save_tensors

__all__ = ["TrainFolder"]

_CONFIG, _METRICS, _PROGRESS, _NETWORKS, _CARD = (
    "config.json", "metrics.jsonl", "progress.safetensors", "networks.safetensors", "card.json",
)  # fmt: skip


class TrainFolder:
    """The files of one training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> TrainFolder:
        """Make the folder. Raises :class:`EditError` if it is there and not empty."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise EditError(
                what="the folder is there and not empty", where=str(path), fix="choose another, or go on: --resume"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                what=f"cannot make the folder: {error.strerror}", where=str(path), fix="choose another (--out)"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> TrainFolder:
        """Open a training's folder. Raises :class:`EditError` if it is none."""
        if not (path / _CONFIG).exists():
            raise EditError(
                what="there is no training in this folder",
                where=str(path),
                fix="give a folder that everedit train made",
            )
        return cls(path)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write what the training is."""
        write_json(self.path / _CONFIG, dict(config))

    def config(self) -> dict[str, Any]:
        """Return what the training is."""
        found: dict[str, Any] = json.loads((self.path / _CONFIG).read_text(encoding="utf-8"))
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row of figures."""
        with (self.path / _METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(row)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all rows of figures; a last line that was cut off is left out."""
        file = self.path / _METRICS
        return list(_whole_lines(file)) if file.exists() else []

    def keep_metrics(self, last: int) -> None:
        """Drop rows of steps after ``last``: they are made again."""
        rows = [row for row in self.metrics() if row["step"] <= last]
        (self.path / _METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def save_best(self, learner: Learner, card: Mapping[str, Any]) -> None:
        """Write the networks as a checkpoint with its card."""
        save_tensors(self.path / _NETWORKS, learner.state_dict(), card)
        write_json(self.path / _CARD, dict(card))

    def card(self) -> dict[str, Any]:
        """Return the card of the best networks."""
        found: dict[str, Any] = json.loads((self.path / _CARD).read_text(encoding="utf-8"))
        return found

    def save_progress(self, learner: Learner, optimiser: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
        """Write all that going on needs, at once or not at all."""
        tensors = {f"net|{name}": tensor for name, tensor in learner.state_dict().items()}
        plain: dict[str, Any] = {}
        for number, state in optimiser.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"opt|{number}|{name}"] = value
                else:
                    plain[f"{number}|{name}"] = value
        save_tensors(self.path / _PROGRESS, tensors, {**values, "optimiser": plain})

    def load_progress(self, learner: Learner, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """Put networks and optimiser back where they were, and return the values saved with them; {} if none were."""
        file = self.path / _PROGRESS
        if not file.exists():
            return {}
        tensors, values = load_tensors(file)
        learner.load_state_dict({key[4:]: tensor for key, tensor in tensors.items() if key.startswith("net|")})
        whole = optimiser.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            if key.startswith("opt|"):
                _, number, name = key.split("|")
                state.setdefault(int(number), {})[name] = tensor
        for key, value in values.pop("optimiser").items():
            number, name = key.split("|")
            state.setdefault(int(number), {})[name] = value
        optimiser.load_state_dict({**whole, "state": state})
        return values


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
