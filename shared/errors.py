"""Errors that a person running the program can act on."""


class UserError(Exception):
    """Bad input, or a machine that cannot do what was asked.

    The message is one line that says what is wrong, where, and what to do about it.
    The command line prints it without a traceback and exits with status 2.

    Example:
        >>> try:
        ...     gflowvlm.Run("no/such/run")
        ... except gflowvlm.UserError as error:
        ...     print(error)
        no/such/run: no run there (no config.yaml); ...
    """


def one_line(error: object, longest: int = 200) -> str:
    """Returns the text of another library's error as one line to quote, cut to `longest` characters."""
    return " ".join(str(error).split())[:longest]
