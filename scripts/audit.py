"""Audits the pinned packages: is each version still offered, was it withdrawn, is a vulnerability of it known?

Asks the package index: its file lists (PEP 691) for versions that are gone or yanked, its advisories (PyPI's JSON API,
which PyPI fills from the OSV database) for vulnerabilities. What cannot be looked up is said, and is no finding
unless ``--strict``.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
INDEX = "https://pypi.org"
AT_ONCE = 8

FOUND, NOT_LOOKED_UP = 1, 3


@dataclass
class Audit:
    """What was found out about one package.

    Attributes:
        name: The package.
        version: Its pinned version.
        findings: What is wrong with it, a line each.
        unknown: What could not be looked up, and why.
    """

    name: str
    version: Version
    findings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def pinned(files: Sequence[Path]) -> Iterator[tuple[str, Version]]:
    """Yields name and version of every package that constraints files pin."""
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                yield requirement.name, Version(next(iter(requirement.specifier)).version)


def audit(name: str, version: Version, index: str, timeout_s: float) -> Audit:
    """Looks one pinned package up.

    Args:
        name: The package.
        version: Its pinned version.
        index: Address of the index.
        timeout_s: Longest wait for each answer, seconds.
    """
    result = Audit(name, version)
    try:
        files = _ask(f"{index}/simple/{name}/", timeout_s, accept="application/vnd.pypi.simple.v1+json")["files"]
    except (OSError, ValueError, KeyError) as error:
        result.unknown.append(f"files: {error}")
    else:
        result.findings += _withdrawn([one for one in files if _version_of(one["filename"]) == version])
    try:
        advisories = _ask(f"{index}/pypi/{name}/{version}/json", timeout_s)["vulnerabilities"]
    except (OSError, ValueError, KeyError) as error:
        result.unknown.append(f"vulnerabilities: {error}")
    else:
        result.findings += [_advisory(one) for one in advisories if one.get("withdrawn") is None]
    return result


def _ask(url: str, timeout_s: float, accept: str = "application/json") -> Any:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


def _reached(index: str, timeout_s: float) -> str | None:
    """Returns why the index cannot be asked, or None: hundreds of requests that time out would take long."""
    try:
        with urllib.request.urlopen(f"{index}/simple/pip/", timeout=timeout_s):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(error)


def _withdrawn(files: list[dict[str, Any]]) -> list[str]:
    if len(files) == 0:
        return ["no longer offered"]
    reasons = [one["yanked"] for one in files if one.get("yanked", False) is not False]
    if len(reasons) < len(files):
        return []
    return [f"withdrawn: {reasons[0] if isinstance(reasons[0], str) else 'no reason given'}"]


def _version_of(filename: str) -> Version | None:
    try:
        parse = parse_wheel_filename if filename.endswith(".whl") else parse_sdist_filename
        return parse(filename)[1]
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None


def _advisory(one: dict[str, Any]) -> str:
    mended = ", ".join(one.get("fixed_in") or []) or "no release"
    summary = " ".join(str(one.get("summary") or one.get("details") or "").split())[:160]
    return f"{one.get('id', 'advisory')}: {summary} (mended in {mended})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the findings; returns 0, 1 with findings, or with ``--strict`` 3 when something was not looked up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ is not None else None)
    parser.add_argument("files", nargs="*", type=Path, help="constraints files (default: all of the project's)")
    parser.add_argument("--index", default=INDEX, help=f"address of the package index (default: {INDEX})")
    parser.add_argument("--timeout", type=float, default=20.0, help="longest wait for an answer, seconds")
    parser.add_argument("--strict", action="store_true", help="fail too when something could not be looked up")
    given = parser.parse_args(arguments)
    packages = list(pinned(given.files or sorted(ROOT.glob("constraints*.txt"))))
    reached = _reached(given.index, given.timeout)
    if reached is not None:
        print(f"audit: nothing looked up, {given.index} does not answer ({reached})")
        return NOT_LOOKED_UP if given.strict else 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        audits = list(pool.map(lambda one: audit(one[0], one[1], given.index, given.timeout), packages))
    for one in audits:
        for finding in one.findings:
            print(f"{one.name} {one.version}: {finding}")
    for kind in ("files", "vulnerabilities"):
        reasons = [reason for one in audits for reason in one.unknown if reason.startswith(kind)]
        if reasons:
            print(f"audit: not looked up for {len(reasons)} of {len(packages)} packages, {reasons[0]}")
    found = sum(len(one.findings) for one in audits)
    print(f"audit: {len(packages)} pinned packages, {found} findings")
    if found > 0:
        return FOUND
    return NOT_LOOKED_UP if given.strict and any(one.unknown for one in audits) else 0


if __name__ == "__main__":
    sys.exit(main())
