"""Which tasks there are, and where the class of each one's settings is.

Imports nothing, so that the shipped tasks can be made known wherever anything of the package is imported.
"""

_PLACES: dict[str, str] = {}


def register_place(task: str, place: str) -> None:
    """Makes a task known.

    Args:
        task: Its name.
        place: Where the class of its settings is, ``module:Class``; imported when it is first needed.

    Raises:
        ValueError: Another task has that name.
    """
    there = _PLACES.setdefault(task, place)
    if there != place:
        raise ValueError(f"task {task!r}: {there} has that name")


def task_names() -> tuple[str, ...]:
    """Returns the names of the tasks."""
    return tuple(_PLACES)


def settings_place(task: str) -> str:
    """Returns where the class of a task's settings is, ``module:Class``.

    Raises:
        KeyError: No such task.
    """
    return _PLACES[task]
