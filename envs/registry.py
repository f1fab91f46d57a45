"""From settings to environments; importing it registers the tasks with gymnasium.

``gymnasium.make("gflowvlm/NumberLine-v0")`` makes one by its class's name, without ``Env``.
"""

import importlib

import gymnasium

from gflowvlm.envs.base import TaskEnv
from gflowvlm.shared.task_settings import TaskSettings, task_names, task_settings_class


def environment_class(settings: TaskSettings) -> type[TaskEnv]:
    """Returns the class of environments of the settings' task."""
    module, _, name = settings.environment.partition(":")
    found = getattr(importlib.import_module(module), name)
    if not issubclass(found, TaskEnv):
        raise TypeError(f"{settings.environment} is no TaskEnv")
    return found


def make_env(settings: TaskSettings) -> TaskEnv:
    """Returns a new environment of the settings' task."""
    return environment_class(settings)(settings)


def gymnasium_id(task: str) -> str:
    """Returns the id under which gymnasium makes a task's environment."""
    name = task_settings_class(task).environment.rpartition(":")[2]
    return f"gflowvlm/{name.removesuffix('Env')}-v0"


for _task in task_names():
    gymnasium.register(id=gymnasium_id(_task), entry_point=task_settings_class(_task).environment)
