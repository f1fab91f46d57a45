"""The terminal that commands print on: what is printed stands there as it is."""

import sys

from rich.console import Console


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Returns a console that reads no syntax in text.

    Paths, names, errors and model output hold brackets and colons, which rich would take for markup and emoji, also in
    the cells of tables and in rules. What is to have a colour is a `rich.text.Text`.

    Args:
        stderr: Whether it prints on stderr instead of stdout.
        quiet: Whether it prints nothing.
    """
    # Plain text in notebooks, where every line would be an output of its own; their kernels force colour, and bars.
    notebook = "ipykernel" in sys.modules
    return Console(
        stderr=stderr,
        quiet=quiet,
        markup=False,
        emoji=False,
        highlight=False,
        force_jupyter=False,
        force_terminal=False if notebook else None,
    )


def printable(text: str) -> str:
    """Returns text without what a terminal acts upon: characters that are not printed stand there as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
