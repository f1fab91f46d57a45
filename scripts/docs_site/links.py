"""Finds links that lead nowhere: in Markdown files, and in a site that was built of them.

Nothing is asked over the network: of an address elsewhere only the form is checked.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

_HOST = re.compile(r"localhost|([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}")
_LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


def markdown_problems(files: Iterable[Path], root: Path) -> list[str]:
    """Returns a line for each link or picture of Markdown files that leads to no file, no heading or no host.

    Args:
        files: The files.
        root: Folder that no link may leave, and that names are shown relative to.
    """
    problems = []
    for file in files:
        for line, target in _targets(file):
            problem = _problem(file, target, root)
            if problem is not None:
                problems.append(f"{file.relative_to(root)}:{line}: {target}: {problem}")
    return problems


def site_problems(site: Path) -> list[str]:
    """Returns a line for each link of a built site that leads nowhere, and for what a page would load from elsewhere.

    Args:
        site: Folder of the site's HTML files.
    """
    pages = {path.resolve(): _Page.of(path) for path in sorted(site.rglob("*.html"))}
    problems = []
    for path, page in pages.items():
        for tag, target in page.links:
            problem = _site_problem(path, tag, target, pages, site.resolve())
            if problem is not None:
                problems.append(f"{path.relative_to(site.resolve())}: {target}: {problem}")
    return problems


def _problem(file: Path, target: str, root: Path) -> str | None:
    address = urlsplit(target)
    if address.scheme or address.netloc:
        return _bad_form(target)
    path = file if address.path == "" else (file.parent / unquote(address.path)).resolve()
    if not path.is_relative_to(root):
        return "leads out of the project"
    if not path.exists():
        return "no such file"
    if address.fragment and (path.suffix != ".md" or address.fragment not in _anchors(path)):
        return "no such heading"
    return None


def _bad_form(target: str) -> str | None:
    address = urlsplit(target)
    if address.scheme == "mailto":
        return None if re.fullmatch(r"[^@\s]+@[^@\s]+", address.path) else "no address"
    if address.scheme not in ("http", "https"):
        return f"scheme {address.scheme or 'missing'}, wanted https"
    if _HOST.fullmatch(address.hostname or "") is None:
        return "no host"
    if address.scheme == "http" and address.hostname != "localhost":
        return "not https"
    return None


def _site_problem(path: Path, tag: str, target: str, pages: dict[Path, "_Page"], site: Path) -> str | None:
    address = urlsplit(target)
    if address.scheme == "data":
        return None
    if address.scheme or address.netloc:
        return "is loaded from another host" if tag in _LOADED else _bad_form(target)
    found = path if address.path == "" else (path.parent / unquote(address.path)).resolve()
    if not found.is_relative_to(site) or not found.is_file():
        return "no such file"
    if address.fragment and found in pages and unquote(address.fragment) not in pages[found].ids:
        return "no such place on the page"
    return None


def _targets(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, target) of a file's links and pictures."""
    for block in _parsed(file):
        line = block.map[0] + 1 if block.map is not None else 0
        for token in block.children or ():
            target = token.attrGet("src" if token.type == "image" else "href")
            if token.type in ("image", "link_open") and target is not None:
                yield line, str(target)


@cache
def _parsed(file: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))


@cache
def _anchors(file: Path) -> frozenset[str]:
    """Returns the anchors of a file's headings, as GitHub and MyST make them."""
    blocks, seen, anchors = _parsed(file), Counter[str](), set()
    for heading, content in pairwise(blocks):
        if heading.type == "heading_open":
            title = "".join(t.content for t in content.children or () if t.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
            anchors.add(slug if seen[slug] == 0 else f"{slug}-{seen[slug]}")
            seen[slug] += 1
    return frozenset(anchors)


class _Page(HTMLParser):
    """What a page can be entered at, and where it leads."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, str]] = []

    @classmethod
    def of(cls, path: Path) -> "_Page":
        """Returns a read page."""
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes a tag's id and target."""
        values = dict(attrs)
        for name in ("id", "name"):
            value = values.get(name)
            if value is not None:
                self.ids.add(value)
        target = values.get(_LOADED.get(tag, "href"))
        if target is not None:
            self.links.append((tag, target))
