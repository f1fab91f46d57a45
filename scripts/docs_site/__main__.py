"""Builds the site into build/docs and checks every link: `make docs`. A warning of Sphinx is an error."""

import os
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
TIMEOUT_S = 1200.0
"""Longest that a build may take; its notebook trains a policy."""

NOTEBOOK_ENVIRONMENT = {
    # As the command line has it; and what ships with the project is all that a notebook needs.
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Of bars that no built page could show.
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


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
    # The notebooks are those of this checkout, whatever is installed.
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, **NOTEBOOK_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, timeout=TIMEOUT_S, env=environment).returncode == 0


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
