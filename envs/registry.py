"""From settings and names to environments."""

from pydantic import TypeAdapter, ValidationError

from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.blackjack.environment import BlackjackEnv
from gflowvlm.envs.household.environment import AlfworldEnv
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.numbersequence.environment import NumberSequenceEnv
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import (
    AlfworldSettings,
    BlackjackSettings,
    NumberLineSettings,
    NumberSequenceSettings,
    TaskSettings,
)

TASKS = (NumberLineEnv.task, BlackjackEnv.task, NumberSequenceEnv.task, AlfworldEnv.task)
"""Names of the tasks."""


def make_env(settings: TaskSettings) -> TaskEnv:
    """Returns a new environment of the settings' task."""
    match settings:
        case NumberLineSettings():
            return NumberLineEnv(settings)
        case BlackjackSettings():
            return BlackjackEnv(settings)
        case NumberSequenceSettings():
            return NumberSequenceEnv(settings)
        case AlfworldSettings():
            return AlfworldEnv(settings)


def default_settings(task: str) -> TaskSettings:
    """Returns a task's default settings.

    Raises:
        UserError: No such task.
    """
    try:
        settings: TaskSettings = TypeAdapter(TaskSettings).validate_python({"name": task})
    except ValidationError:
        raise UserError(f"task {task!r}: there is no such task; use one of: {', '.join(TASKS)}") from None
    return settings
