"""What a person reads when an option of a command is out of bounds."""

from collections.abc import Mapping

from pydantic import ValidationError


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
