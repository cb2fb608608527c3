"""What every block of a recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=120)]


class Settings(BaseModel):
    """Base of every block: frozen, unknown keys refused, attribute docstrings become the schema's descriptions.

    Validators are built when a block is first used, since every command imports the schema and few use all of it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, defer_build=True
    )


def refuse_adapters_in_list(trainable: str | list[str]) -> None:
    """``trainable: [lora, projector]`` would mean adapters and full weights in one branch, which is not supported.

    Raises:
        ValueError: The list names ``lora`` or ``all``.
    """
    if not isinstance(trainable, str) and (alone := [item for item in trainable if item in ("lora", "all")]):
        raise ValueError(f"trainable: {alone[0]} must be given alone, not in a list (trainable: {alone[0]})")
