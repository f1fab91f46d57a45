"""The audit of pinned packages, against an index that a test fills."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Index:
    """A package index with what a test puts in."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"/simple/pip/": {"files": []}}

    def offer(self, name: str, *files: str, yanked: bool | str = False) -> None:
        listed = self.answers.setdefault(f"/simple/{name}/", {"files": []})["files"]
        listed += [{"filename": file, "yanked": yanked} for file in files]

    def advise(self, name: str, version: str, *vulnerabilities: dict[str, Any]) -> None:
        self.answers[f"/pypi/{name}/{version}/json"] = {"vulnerabilities": list(vulnerabilities)}


@pytest.fixture
def index() -> Iterator[tuple[Index, str]]:
    offered = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = offered.answers.get(self.path)
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield offered, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(timeout=10)


def audit(tmp_path: Path, address: str, *pins: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pinned\n" + "\n".join(pins) + "\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "audit.py"), str(constraints), "--index", address, *options]
    environment = {**os.environ, "no_proxy": "*"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_packages_that_are_offered_and_of_which_nothing_is_known_pass(tmp_path, index):
    offered, address = index
    offered.offer("good", "good-1.2-py3-none-any.whl", "good-1.1.tar.gz")
    offered.advise("good", "1.2")
    assert audit(tmp_path, address, "good==1.2", options=("--strict",)) == (0, "audit: 1 pinned packages, 0 findings\n")


def test_withdrawn_vanished_and_vulnerable_versions_are_findings(tmp_path, index):
    offered, address = index
    offered.offer("pulled", "pulled-2.0-py3-none-any.whl", "pulled-2.0.tar.gz", yanked="broken wheels")
    offered.offer("vanished", "vanished-1.0.tar.gz")
    offered.offer("holed", "holed-3.0.tar.gz")
    vulnerable = {"id": "PYSEC-1", "summary": "reads\nfiles", "fixed_in": ["3.1"], "withdrawn": None}
    offered.advise("holed", "3.0", vulnerable, {"id": "PYSEC-2", "summary": "no", "withdrawn": "2026-01-01"})
    code, said = audit(tmp_path, address, "pulled==2.0", "vanished==1.1", "holed==3.0")
    assert code == 1
    assert "pulled 2.0: withdrawn: broken wheels\n" in said
    assert "vanished 1.1: no longer offered\n" in said
    assert "holed 3.0: PYSEC-1: reads files (mended in 3.1)\n" in said
    assert "3 findings" in said
    assert "PYSEC-2" not in said


def test_a_version_of_which_some_files_stay_is_not_withdrawn(tmp_path, index):
    offered, address = index
    offered.offer("half", "half-1.0.tar.gz", yanked=True)
    offered.offer("half", "half-1.0-py3-none-any.whl")
    assert audit(tmp_path, address, "half==1.0")[0] == 0


def test_what_cannot_be_looked_up_is_said_and_fails_only_when_strict(tmp_path, index):
    offered, address = index
    offered.offer("good", "good-1.2.tar.gz")
    code, said = audit(tmp_path, address, "good==1.2")
    assert code == 0
    assert "not looked up for 1 of 1 packages, vulnerabilities: HTTP Error 404" in said
    assert audit(tmp_path, address, "good==1.2", options=("--strict",))[0] == 3
    code, said = audit(tmp_path, "http://127.0.0.1:9", "good==1.2")
    assert code == 0
    assert "nothing looked up, http://127.0.0.1:9 does not answer" in said
    assert audit(tmp_path, "http://127.0.0.1:9", "good==1.2", options=("--strict",))[0] == 3
