"""What all sections of a run's config have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are refused, and the docstring below a setting documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
