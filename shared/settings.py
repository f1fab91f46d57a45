"""The base of all settings, and the types that several of them share."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

# Kubernetes' label syntax, which Ray follows.
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{{0,251}}[A-Za-z0-9])?/)?{_WORD}")
_CONDITION = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:, ?{_WORD})*\))")
_RESOURCE = re.compile(r"[A-Za-z][A-Za-z0-9_.:/-]{0,126}")
_NO_CUSTOM_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


def _check_resource(name: str) -> str:
    if _RESOURCE.fullmatch(name) is None or name in _NO_CUSTOM_RESOURCES:
        raise ValueError("is no custom resource of Ray (CPUs and GPUs have settings of their own)")
    return name


def _check_label(key: str) -> str:
    if _LABEL.fullmatch(key) is None:
        raise ValueError("is no label of a node")
    return key


def _check_condition(condition: str) -> str:
    if _CONDITION.fullmatch(condition) is None:
        raise ValueError("is no condition on a label: write a, !a, in(a, b) or !in(a, b), in quotes")
    return condition


# Ray counts in steps of 0.0001.
CustomResources = Annotated[
    dict[Annotated[str, AfterValidator(_check_resource)], Annotated[float, Field(ge=1e-4, le=1e6)]],
    Field(max_length=16),
]
NodeLabels = Annotated[
    dict[Annotated[str, AfterValidator(_check_label)], Annotated[str, AfterValidator(_check_condition)]],
    Field(max_length=16),
]


@dataclass(frozen=True)
class PathMarker:
    """Marks a field as a path of the machine that the run starts on.

    Attributes:
        or_name: Whether the field may hold a name instead: of a shipped model, or of one on a hub.
        advice: What to do where there is no such folder.
    """

    or_name: bool = False
    advice: str = "give one that is there"


FolderPath = Annotated[str, PathMarker()]
"""A folder."""

ModelName = Annotated[str, PathMarker(or_name=True, advice="give a model directory, a hub name or a shipped model")]
"""A model directory, a hub name, or the name of a shipped model."""


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
