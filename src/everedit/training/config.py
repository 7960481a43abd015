"""What a training is: method, model, data, and the settings of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from everedit.errors import EditError
from everedit.methods import method_class
from everedit.methods._trained import TrainedMethod

__all__ = ["TrainConfig"]


class TrainConfig(BaseModel):
    """A training's settings; those of the loop that are None are the method's published ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    model: str
    data: str
    data_path: Path | None = None
    validation: str | None = Field(None, description="data set to validate on; None: the last records of the data")
    validation_path: Path | None = None
    held_out: int = Field(100, ge=1, description="records to validate on")
    steps: int | None = Field(None, ge=1, description="most passes over a batch")
    batch: int | None = Field(None, ge=1, description="examples in a pass, edited together")
    accumulation: int | None = Field(None, ge=1, description="passes in a step of the optimiser")
    clip: float | None = Field(None, gt=0, description="most that a step's gradient may measure")
    check_every: int | None = Field(None, ge=1, description="passes between validations, after which all is saved")
    patience: int | None = Field(None, ge=1, description="passes without a better validation after which it stops")
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    method_settings: dict[str, Any] = Field(default_factory=dict)

    def resolved(self) -> TrainConfig:
        """Return the config with the method's published settings of the loop filled in.

        Raises :class:`EditError` if the method needs no training, or is to be saved amid a step of the optimiser.
        """
        kind = method_class(self.method)
        if not issubclass(kind, TrainedMethod):
            raise EditError(
                what=f"{self.method} needs no training", fix=f"use it as it is: everedit edit --method {self.method} …"
            )
        given = self.model_dump()
        whole = self.model_copy(update={name: value for name, value in kind.training.items() if given[name] is None})
        if (whole.check_every or 1) % (whole.accumulation or 1):
            raise EditError(
                what=f"check_every is {whole.check_every} and accumulation {whole.accumulation}: what is saved amid a "
                "step would lose its gradients",
                fix="let check_every be a multiple of accumulation",
            )
        return whole
