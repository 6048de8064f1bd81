"""What all saved documents have in common: how they are checked, and how they become JSON.

A document is frozen.  Reading ignores keys that it does not know, since later versions may add
some.  A key that has a default is written only where it says something else; every other key is
always there, ``null`` where nothing was measured.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1
"""Of every document; it grows when a key changes its meaning."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Measured = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A quantity that cannot be negative."""
Count = Annotated[int, Field(ge=0)]
Interval = tuple[Number, Number]
"""Lower and upper end."""
MeasuredInterval = tuple[Measured, Measured]


class Part(BaseModel):
    """A part of a document."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Document(Part):
    """What one command writes."""

    def to_json(self) -> dict[str, Any]:
        """The document as JSON values, ``schema`` first."""
        return {"schema": SCHEMA, **self.model_dump(mode="json", exclude_defaults=True)}
