"""Settings given by a user, checked against the config that they are for."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from everedit.errors import EditError

__all__ = ["validated"]

Config = TypeVar("Config", bound=BaseModel)


def validated(model: type[Config], values: dict[str, Any], kind: str) -> Config:
    """Return ``model(**values)``. Raises :class:`EditError` that names each bad setting and the known ones."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise EditError(
            what=f"bad settings: {problems}",
            where=kind,
            fix=f"known settings: {', '.join(model.model_fields)}",
        ) from error
