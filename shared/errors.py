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
