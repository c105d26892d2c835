"""The base class of every configuration section, and the mark for values that do not change a run's result."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hpcdistill.storage import user_place

UserPlace = Annotated[str, AfterValidator(user_place)]  # a file or folder, `~` expanded, or an address as it is


class Section(BaseModel):
    """A typed part of a run's configuration. Unknown keys are errors; values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that says how a run is carried out (paths, workers, logging) and is not part of its identity."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def identity_values(section: Section) -> dict[str, Any]:
    """The values of `section`, nested, that differ from their defaults and are part of the run's identity."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("operational"):
            continue
        value = getattr(section, name)
        if isinstance(value, Section):
            nested = identity_values(value)
            if nested:
                values[name] = nested
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            values[name] = value
    return values
