"""What all sections of the settings are."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Base of all sections: immutable, strict types, unknown keys and non-finite numbers refused."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_python(cls, given: Any) -> Any:
        """Seeds of `numpy.arange`, say, are numbers as well."""
        if not isinstance(given, dict):
            return given
        return {key: value.item() if isinstance(value, np.generic) else value for key, value in given.items()}


def contradiction(key: str, problem: str, *, against: str) -> PydanticCustomError:
    """Two settings that exclude each other; `key` is the one to change, both are paths from the validating section."""
    return PydanticCustomError(
        "contradiction", "{key}: {problem}", {"key": key, "problem": problem, "against": against}
    )
