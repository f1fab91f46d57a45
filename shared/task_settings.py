"""What the settings of all tasks have in common, and which tasks there are.

The settings of one task stand in its folder, ``envs/FOLDER/settings.py``. `gflowvlm.envs` registers those of the
shipped tasks here, and whoever imports anything of `gflowvlm` has imported it.
"""

import re
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from gflowvlm.shared.answer_formats import DEFAULT_FORMAT
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.settings import Settings
from gflowvlm.shared.task_registry import register_place, settings_place
from gflowvlm.shared.task_registry import task_names as task_names

DEFAULT_TASK = "numberline"


class TaskSettings(Settings):
    """Base of every task's settings. What holds for the whole task, whatever its settings, is declared on the class.

    A subclass declares ``name: Literal["NAME"]`` with that default, and is made known by `register_task`.

    Attributes:
        environment: Where the task's `TaskEnv` is, ``module:Class``; imported when the first one is made.
        largest_reward: The largest single one of the task's own rewards.
        exact_target: Whether the exact distribution over an instance's outcomes can be computed, and its environment be
            made at no cost anywhere, as on a report's page.
        in_own_process: Whether its environments are held by processes of their own unless a configuration says
            otherwise: for steps that take long, or code that may take its process down.
        tokenizer_texts: Its words, from which the tokenizer of a new tiny policy is made, together with other tasks'.
        measured_on: What a final report is measured on, as the end of "... on".
    """

    environment: ClassVar[str]
    largest_reward: ClassVar[float] = 1.0
    exact_target: ClassVar[bool] = True
    in_own_process: ClassVar[bool] = False
    tokenizer_texts: ClassVar[tuple[str, ...]] = ()
    measured_on: ClassVar[str] = "instances used neither in training nor to choose the adapter"

    name: str = Field(description="Chooses this task.")
    max_steps: int = Field(10, ge=1, le=64, description="Step limit.")
    prompt: Literal["history", "markov"] = Field("history", description="Whether past steps stand in the prompt.")
    image_size: int = Field(64, ge=32, le=1024, description="Side of the square picture, pixels.")
    pictures: int = Field(
        1, ge=1, le=16, description="Pictures in a prompt: those of the last so many states, the current one last."
    )
    answer_format: str = Field(
        DEFAULT_FORMAT,
        description="How the policy answers: `json`, `tags`, or `module:Class` for a format of your own.",
    )

    @field_validator("answer_format")
    @classmethod
    def _is_a_known_form(cls, name: str) -> str:
        if re.fullmatch(r"json|tags|[\w.]+:\w+", name) is None:
            raise ValueError("is no answer format; there are json, tags, and module:Class for one of your own")
        return name

    def for_reading(self) -> Self:
        """Returns the settings whose ``ood`` split a policy learns best to read from: what it shows is independent."""
        return self


_CLASSES: dict[str, type[TaskSettings]] = {}
"""Classes that were registered themselves, or imported from their place."""


def register_task(settings: type[TaskSettings]) -> None:
    """Makes a task known by the default of its settings' ``name``.

    Raises:
        ValueError: Another task has that name, or there is no such default.
    """
    name = settings.model_fields["name"].default
    if not isinstance(name, str):
        raise ValueError(f"{settings.__name__}: declare name: Literal[...] with the task's name as its default")
    register_place(name, f"{settings.__module__}:{settings.__qualname__}")
    _CLASSES[name] = settings


def task_settings_class(task: str) -> type[TaskSettings]:
    """Returns the class of a task's settings.

    Raises:
        UserError: No such task.
    """
    if task not in task_names():
        raise UserError(f"task {task!r}: there is no such task; use one of: {', '.join(task_names())}")
    if task not in _CLASSES:
        module, _, name = settings_place(task).partition(":")
        register_task(getattr(import_module(module), name))
    return _CLASSES[task]


def default_settings(task: str = DEFAULT_TASK) -> TaskSettings:
    """Returns a task's default settings.

    Raises:
        UserError: No such task.
    """
    return task_settings_class(task).model_validate({})


def _of_its_class(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    name = settings.get("name", DEFAULT_TASK)
    if isinstance(name, str) and name in task_names():
        return task_settings_class(name).model_validate(settings)
    unknown = PydanticCustomError(
        "unknown_task", "there is no such task; use one of: {tasks}", {"tasks": ", ".join(task_names())}
    )
    raise ValidationError.from_exception_data("task", [InitErrorDetails(type=unknown, loc=("name",), input=name)])


AnyTaskSettings = Annotated[SerializeAsAny[TaskSettings], BeforeValidator(_of_its_class)]
"""A field that holds the settings of any task; `name` says which, NumberLine by default."""
