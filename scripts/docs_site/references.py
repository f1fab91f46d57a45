"""Writes the reference pages anew: `make reference`."""

from collections.abc import Callable
from pathlib import Path

from docs_site.api import api_page
from docs_site.commands import commands_page
from docs_site.configuration import configuration_page

DOCS = Path(__file__).resolve().parents[2] / "docs"

PAGES: dict[Path, Callable[[], str]] = {
    DOCS / "configuration.md": configuration_page,
    DOCS / "commands.md": commands_page,
    DOCS / "api.md": api_page,
}
"""File -> what makes its text."""

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
        print(f"written: {path}")
