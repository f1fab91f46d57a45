"""Builds the site into build/docs and checks every link: `make docs`. A warning of Sphinx is an error."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from docs_site.links import markdown_problems, site_problems

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS = ROOT / "docs"
SITE = ROOT / "build" / "docs"
TIMEOUT_S = 300.0


def build(docs: Path, site: Path) -> bool:
    """Builds a site anew; Sphinx prints what it minds.

    Args:
        docs: Folder of the pages.
        site: Folder of the site; what it holds is removed.

    Returns:
        Whether Sphinx was content with all of it.
    """
    shutil.rmtree(site, ignore_errors=True)
    options = ["-b", "html", "-c", HERE, "-d", site.with_name("doctrees"), "-E", "-W", "--keep-going", "-q"]
    command = [sys.executable, "-m", "sphinx", *map(str, options), str(docs), str(site)]
    return subprocess.run(command, timeout=TIMEOUT_S).returncode == 0


def main() -> int:
    """Returns the exit status."""
    began = time.monotonic()
    if not build(DOCS, SITE):
        print("docs: the site was not built without warnings, see above", file=sys.stderr)
        return 1
    pages = sorted(DOCS.glob("*.md"))
    problems = markdown_problems([ROOT / "README.md", *pages], ROOT) + site_problems(SITE)
    for problem in problems:
        print(f"docs: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(f"docs: {len(pages)} pages, no dead link, {time.monotonic() - began:.0f} s: {SITE / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
