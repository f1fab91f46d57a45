"""Sphinx's settings for docs/. `make docs` builds the site; nothing of it is loaded from another host."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

project = "GFlowVLM"
extensions = ["myst_nb"]
root_doc = "index"
# Pages with code cells are executed at every build, in a folder of their own; an error there fails the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
# Headings get the anchors that they have on GitHub.
myst_heading_anchors = 3
# Commands stay on one line and scroll; what is marked `text` wraps (static/site.css).
highlight_language = "none"
# Options such as --dry-run keep their two hyphens.
smartquotes = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_use_index = False
templates_path: list[str] = []

RESULTS = "What it reaches"
"""The README's section that the start page ends with."""

NAVIGATION = {
    "Start": ("quickstart", "concepts", "tasks", "python"),
    "Use": ("checking", "objectives", "demonstrations", "recipe", "experiments", "alfworld", "report", "serving"),
    "Operate": ("cluster", "one-gpu", "gpu", "watching", "scale", "operations"),
    "Reference": ("configuration", "commands", "api", "metrics"),
    "Evidence": ("results", "proving", "compare-torchgfn", "benchmarks"),
    "Develop": ("contributing",),
}
"""Captions and pages; those that do not exist are left out, and what nothing names comes last."""


def navigation(pages: set[str]) -> str:
    """Returns the navigation over these pages as hidden tables of contents."""
    placed = {page for names in NAVIGATION.values() for page in names}
    parts = {**NAVIGATION, "More": tuple(sorted(pages - placed - {root_doc}))}
    blocks = []
    for caption, names in parts.items():
        there = [name for name in names if name in pages]
        if there:
            blocks.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *there, "```"]))
    return "\n\n".join(blocks)


def results(readme: str) -> str:
    """Returns the README's section of results, with links as seen from docs/.

    Raises:
        ValueError: The README has no such section.
    """
    _, found, section = readme.partition(f"\n## {RESULTS}\n")
    if not found:
        raise ValueError(f"README.md has no section {RESULTS!r}, which the start page of the documentation shows")
    return f"## {RESULTS}\n{section.partition(chr(10) + '## ')[0]}".replace("](docs/", "](")


def read_source(app: Any, name: str, content: list[str]) -> None:
    """Adds results and navigation to the start page, and leads links to the README's results there."""
    anchor = RESULTS.lower().replace(" ", "-")
    content[0] = content[0].replace(f"](../README.md#{anchor})", f"](index.md#{anchor})")
    if name == root_doc:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        pages = {path.stem for path in Path(app.srcdir).glob("*.md")}
        content[0] = "\n\n".join([content[0], results(readme), navigation(pages)])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read_source)
