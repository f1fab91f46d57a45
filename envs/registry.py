"""From settings and names to environments."""

from pydantic import ValidationError

from envs.base import TaskEnv
from envs.numberline.environment import NumberLineEnv
from shared.errors import UserError
from shared.task_settings import NumberLineSettings, TaskSettings

TASKS = (NumberLineEnv.task,)
"""Names of the tasks."""


def make_env(settings: TaskSettings) -> TaskEnv:
    """Returns a new environment of the settings' task."""
    return NumberLineEnv(settings)


def default_settings(task: str) -> TaskSettings:
    """Returns a task's default settings.

    Raises:
        UserError: No such task.
    """
    try:
        return NumberLineSettings.model_validate({"name": task})
    except ValidationError:
        raise UserError(f"task {task!r}: there is no such task; use one of: {', '.join(TASKS)}") from None
