"""The documentation's site: pages made from the code are in step with it, and no link leads nowhere."""

import importlib.util
import inspect
import shutil
from pathlib import Path

import pytest
from docs_site.__main__ import build
from docs_site.api import ORDER, api_page
from docs_site.api import markdown as api_markdown
from docs_site.commands import commands_page
from docs_site.conf import NAVIGATION, RESULTS, navigation, results
from docs_site.configuration import fields_without_description, settings_table
from docs_site.examples import example_problems
from docs_site.links import markdown_problems, site_problems
from docs_site.references import DOCS, PAGES
from pydantic import Field

import gflowvlm
from gflowvlm.shared.settings import Fraction, Settings

ROOT = DOCS.parent
needs_sphinx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo")),
    reason="no Sphinx here; `make docs` installs it",
)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_made_from_the_code_is_what_the_code_gives(path: Path) -> None:
    assert path.read_text() == PAGES[path](), "run: make reference"


def test_the_reference_has_every_public_name_and_what_its_docstring_says() -> None:
    assert set(ORDER) == set(gflowvlm.__all__)
    page = api_page()
    for name in gflowvlm.__all__:
        assert f"## gflowvlm.{name}\n" in page
    assert "### Run.trajectories\n" in page
    assert "Run.metrics(kind='step') -> pd.DataFrame" in page
    assert "[metrics.md](metrics.md)" in page
    assert "doctest" not in page


def test_a_docstring_is_shown_as_lists_and_blocks() -> None:
    text = """Does it, see docs/metrics.md.

    It is ``quick``.

    Args:
        first: What
            goes | in.
        second: More.

    Returns:
        What came out.

    Example:
        So:

        >>> done(1)  # doctest: +SKIP
        2
    """
    shown = api_markdown(inspect.cleandoc(text))
    assert shown == (
        "Does it, see [metrics.md](metrics.md).\n\nIt is `quick`.\n\n"
        "Arguments:\n\n- `first`: What goes | in.\n- `second`: More.\n\n"
        "Returns: What came out.\n\n"
        "So:\n\n```pycon\n>>> done(1)\n2\n```\n"
    )


def test_every_setting_describes_itself() -> None:
    assert fields_without_description() == []


def test_a_settings_row_has_type_bounds_default_and_description() -> None:
    class Made(Settings):
        share: Fraction = Field(0.25, description="A share | of all.")
        limit: int | None = Field(None, gt=0, lt=2**31, description="A limit.")
        names: list[str] = Field(default=["a", "b"], min_length=1, description="Names.")
        on: bool = Field(True, description="On.")

    assert settings_table(Made, "made.").replace("\N{NO-BREAK SPACE}", " ").splitlines()[2:] == [
        "| `made.share` | number, ≥ 0, ≤ 1 | `0.25` | A share \\| of all. |",
        "| `made.limit` | integer, `null`, > 0, < 2,147,483,648 | `null` | A limit. |",
        "| `made.names` | list of text, length ≥ 1 | `a`, `b` | Names. |",
        "| `made.on` | `true`, `false` | `true` | On. |",
    ]


def test_the_commands_page_has_arguments_options_and_their_bounds() -> None:
    page = commands_page()
    assert "## gflowvlm alfworld generate\n" in page
    section = page.partition("## gflowvlm eval\n")[2].partition("\n## ")[0]
    (samples,) = [line for line in section.splitlines() if "`--samples" in line]
    assert "default: 8" in samples
    assert "1<=x<=1024" in samples


def test_no_link_of_readme_and_documentation_leads_nowhere() -> None:
    assert markdown_problems([ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ROOT) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](missing.md)", "no such file"),
        ("![a](missing.png)", "no such file"),
        ("[a](other.md#nowhere)", "no such heading"),
        ("[a](#nowhere)", "no such heading"),
        ("| a |\n|---|\n| [a](missing.md) |", "no such file"),
        ("[a](../../etc)", "leads out of the project"),
        ("[a](https://no_host/)", "no host"),
        ("[a](http://example.org/)", "not https"),
        ("[a](htps://example.org/)", "scheme htps"),
        ("`[a](missing.md)`\n\n    [a](missing.md)", None),
        ("[a](other.md#a-title-with-code--more) [b](other.md#again-1) [c](https://example.org/a#b)", None),
    ],
)
def test_a_link_is_judged_by_where_it_leads(tmp_path: Path, text: str, problem: str | None) -> None:
    (tmp_path / "other.md").write_text("# A title, with `code` & more!\n\n## Again\n\n## Again\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    found = markdown_problems([page], tmp_path)
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith("page.md:")
        assert problem in found[0]


def test_every_command_of_readme_and_documentation_is_one_that_the_code_knows() -> None:
    pages = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
    assert example_problems(pages, (ROOT / "Makefile").read_text()) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`gflowvlm trian`", "there is no command gflowvlm trian"),
        ("`gflowvlm alfworld play`", "there is no command gflowvlm alfworld play"),
        ("`gflowvlm train --plan`", "gflowvlm train has no option --plan"),
        ("| a |\n|---|\n| `gflowvlm eval RUN --wrong=1` |", "gflowvlm eval has no option --wrong"),
        ("```\n.venv/bin/gflowvlm train \\\n  --wrong\n```", "gflowvlm train has no option --wrong"),
        ("`gflowvlm train learner.stepz=4`", "there is no setting learner.stepz"),
        ("`make tset`", "make has no target tset"),
        (
            "`gflowvlm replay RUN\n--failed` and `gflowvlm train [--run DIR] learner.steps=4 …` of `gflowvlm COMMAND`",
            None,
        ),
        ("`kubectl -n gflowvlm exec gflowvlm -- gflowvlm trian`", "there is no command gflowvlm trian"),
        ("`gflowvlm alfworld` `kubectl -n gflowvlm get pods` `make docs`, gflowvlm is", None),
        ("`gflowvlm train --dry-run; make` and `gflowvlm alfworld generate --train 4`", None),
    ],
)
def test_a_command_is_judged_by_what_the_code_knows(tmp_path: Path, text: str, problem: str | None) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{text}\n")
    found = example_problems([page], "docs: setup ## the site\n")
    assert [line.partition(": ")[2] for line in found] == ([] if problem is None else [problem])


def test_a_site_with_a_dead_link_or_something_from_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.html").write_text('<h1 id="here">Two</h1><img src="../a.png"><a href="../one.html">1</a>')
    (tmp_path / "a.png").touch()
    whole = '<a href="b/two.html#here">2</a> <a href="https://example.org">out</a> <a href="#top" id="top">up</a>'
    (tmp_path / "one.html").write_text(whole)
    assert site_problems(tmp_path) == []
    (tmp_path / "one.html").write_text(
        '<a href="b/two.html#there">2</a><a href="b/three.html">3</a><script src="https://cdn.example.org/x.js"></script>'
    )
    assert site_problems(tmp_path) == [
        "one.html: b/two.html#there: no such place on the page",
        "one.html: b/three.html: no such file",
        "one.html: https://cdn.example.org/x.js: is loaded from another host",
    ]


def test_a_page_that_no_part_of_the_navigation_names_is_in_it_all_the_same() -> None:
    shown = navigation({"index", "concepts", "new-page"})
    assert shown.index("concepts") < shown.index(":caption: More") < shown.index("new-page")
    assert "quickstart" not in shown
    assert {page for pages in NAVIGATION.values() for page in pages} >= {"quickstart", "concepts", "operations"}


def test_the_start_page_shows_the_readmes_results_with_links_from_docs() -> None:
    shown = results((ROOT / "README.md").read_text())
    assert shown.startswith(f"## {RESULTS}\n")
    assert "](docs/" not in shown
    assert shown.count("\n## ") == 0
    with pytest.raises(ValueError, match=RESULTS):
        results("# Another\n")


@needs_sphinx
@pytest.mark.slow
def test_a_dead_link_fails_the_build(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in ("index.md", "concepts.md", "dataflow.svg", "comparison-losses.png"):
        shutil.copy(DOCS / name, pages)
    for path in DOCS.glob("*.md"):
        if not (pages / path.name).exists():
            titles = [line for line in path.read_text().splitlines() if line.startswith("#")]
            (pages / path.name).write_text("\n\n".join(titles) + "\n")
    with (pages / "concepts.md").open("a") as page:
        page.write("\n[gone](recipe.md#no-such-heading)\n")
    assert not build(pages, tmp_path / "site")
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "WARNING" in line]
    assert "no-such-heading" in warning
    assert site_problems(tmp_path / "site") == ["concepts.html: recipe.html#no-such-heading: no such place on the page"]
