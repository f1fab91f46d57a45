"""What a person reads when an option of a command is out of bounds, or a setting has an option of its own."""

from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from gflowvlm.shared.errors import UserError


def first_problem(error: ValidationError, options: Mapping[str, str]) -> str:
    """Returns the first problem of a request in one line.

    Args:
        error: What validating the request raised.
        options: Names of options that are called otherwise than their fields.
    """
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    says = f"{message[0].lower()}{message[1:]}"
    name = str(problem["loc"][-1]) if problem["loc"] else "the options"
    return f"--{options.get(name, name).replace('_', '-')} {problem['input']}: {says}"


def refuse_overrides(overrides: Iterable[str], options: Mapping[str, str]) -> None:
    """Refuses settings that a command sets itself, run by run.

    Args:
        overrides: As they were given, ``section.key=value``.
        options: The option that stands for a setting, by the setting's name.

    Raises:
        UserError: One of them is such a setting.
    """
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name in options:
            raise UserError(f"{override}: this command sets {name} itself, for each run; use {options[name]}")
