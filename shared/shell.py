"""Commands that messages tell a person to type."""

import shlex


def quoted(argument: object) -> str:
    """Returns an argument as a shell reads it back: quoted where it holds spaces, brackets or the like."""
    return shlex.quote(str(argument))
