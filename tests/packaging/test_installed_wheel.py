"""The wheel in a fresh environment, used from a project whose packages have the names of our folders.

Training samples with transformers, which starts within seconds; serving starts vLLM and answers with an adapter, which
on a machine without a GPU works only through the plugin that vLLM finds among the wheel's entry points.
"""

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from gflowvlm.envs.registry import make_env
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import read_rows
from gflowvlm.run.models import resolve_model
from gflowvlm.run.setup import open_run
from gflowvlm.shared.task_settings import default_settings
from tests.packaging.builds import PACKAGE, ROOMS, fresh_environment
from tests.whole_runs import MARK, assert_nothing_is_left, wait_for

pytestmark = pytest.mark.slow

NAMES = (*ROOMS, "tests", "scripts")
"""Packages of the project: what our folders are called."""

SETTINGS = (
    "learner.steps=2",
    "learner.groups_per_batch=2",
    "rollout.group_size=4",
    "rollout.groups_per_worker=2",
    "sampler.engine=transformers",
    "sampler.kv_cache_gib=0.03",
    "sampler.max_num_seqs=8",
    "evaluation.at_start=false",
    "evaluation.instances=2",
    "evaluation.samples=2",
    "cluster.dashboard=false",
    "cluster.object_store_mib=80",
)

PROGRAM = """
import importlib
import sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


@dataclass
class Project:
    """Somebody's project, and the environment that the wheel is installed in.

    Attributes:
        root: The project's folder.
        environment: Its virtual environment.
        runs: Where runs are put, outside of the project.
        origins: What `record_origins` writes.
    """

    root: Path
    environment: Path
    runs: Path
    origins: Path

    @property
    def packages(self) -> Path:
        """The environment's folder of packages."""
        (folder,) = self.environment.glob("lib/python*/site-packages")
        return folder

    @property
    def variables(self) -> dict[str, str]:
        """The variables that its commands run under; not those of the tests that start them."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {
            **kept,
            "PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "200",
            "ORIGINS": str(self.origins),
            "ORIGINS_NAMES": ",".join((PACKAGE, *NAMES)),
        }

    def run(self, *command: str, **more: str) -> str:
        """Runs a command in the project's folder; returns what it printed."""
        done = subprocess.run(
            command, cwd=self.root, env={**self.variables, **more}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        return done.stdout

    def python(self, *arguments: str, **more: str) -> str:
        """Runs the environment's Python in the project's folder."""
        return self.run(str(self.environment / "bin" / "python"), *arguments, **more)

    def files(self) -> dict[str, str]:
        """Every file of the project with its content's hash."""
        paths = [path for path in self.root.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def imports(self) -> list[dict]:
        """What the processes since the last call have imported."""
        rows = []
        for file in self.origins.iterdir():
            rows += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            file.unlink()
        return rows

    def where(self, *names: str, **more: str) -> list[Path]:
        """Imports packages in a program of the project; returns the files that they come from."""
        return [Path(line) for line in self.python("program.py", *names, **more).splitlines()]


@pytest.fixture(scope="module")
def project(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project beside which the wheel is installed; what the wheel needs comes from this environment."""
    base = tmp_path_factory.mktemp("beside")
    made = Project(base / "project", base / "environment", base / "runs", base / "origins")
    for folder in (made.runs, made.origins):
        folder.mkdir()
    for name in NAMES:
        (made.root / name).mkdir(parents=True)
        (made.root / name / "__init__.py").write_text(f'"""The project\'s own {name}."""\n')
    (made.root / "program.py").write_text(PROGRAM)
    fresh_environment(made.environment, wheel)
    (made.packages / "origins.pth").write_text("import record_origins\n")
    shutil.copy(Path(__file__).with_name("record_origins.py"), made.packages)
    return made


def assert_ours_and_theirs_are_kept_apart(project: Project, *, on_path: bool) -> None:
    """Checks all processes since the last call.

    Args:
        project: Whose.
        on_path: Whether the project's folder is on the path of every process, so that its packages must be found.
    """
    rows = project.imports()
    assert {row["imported"] for row in rows} == {PACKAGE}, "one of ours imported a package of the project's"
    assert {row["from"] for row in rows} == {str(project.packages / PACKAGE / "__init__.py")}
    for row in rows:
        for name in NAMES:
            theirs = str(project.root / name / "__init__.py")
            assert row["sees"][name] in ((theirs,) if on_path else (theirs, None)), row
    started = [" ".join(row["command"]) for row in rows]
    assert any("default_worker.py" in command for command in started), started


def steps_taken(run: Path) -> list[int]:
    return [row["step"] for row in read_rows(RunFolder(run).metrics) if row["kind"] == "step"]


def test_pip_lists_files_of_one_package_and_scripts_only(project: Project) -> None:
    told = project.python("-m", "pip", "show", "--files", PACKAGE)
    assert f"Location: {project.packages}" in told
    files = [line.strip() for line in told.partition("Files:\n")[2].splitlines() if line.strip()]
    assert len(files) > 200
    other = [name for name in files if not name.startswith((f"{PACKAGE}/", f"{PACKAGE}-0.1.0.dist-info/"))]
    assert other == ["../../../bin/gflowvlm"]


def test_its_names_are_found_from_the_project(project: Project) -> None:
    assert project.where(PACKAGE, *NAMES) == [
        project.packages / PACKAGE / "__init__.py",
        *(project.root / name / "__init__.py" for name in NAMES),
    ]
    code = "from importlib.metadata import entry_points as e; print(*e(group='vllm.platform_plugins', name=%r))"
    found = project.python("-c", code % "gflowvlm_cpu_lora")
    assert found.count("gflowvlm.actors.cpu_platform:cpu_lora_platform") == 1
    public = "import gflowvlm\nfor name in gflowvlm.__all__: getattr(gflowvlm, name)\nprint(gflowvlm.__all__)"
    assert "'train'" in project.python("-c", public)
    assert "0.1.0" in project.run("gflowvlm", "--version")
    told = project.run("gflowvlm", "--help")
    assert all(command in told for command in ("train", "eval", "play", "bench", "doctor"))
    for path in ({}, {"PYTHONPATH": "."}):
        assert "numberline-tiny" in project.run("gflowvlm", "presets", **path)


@pytest.mark.parametrize("path", [{}, {"PYTHONPATH": "."}], ids=["in its folder", "with it on the path"])
def test_it_trains_through_ray_and_every_process_imports_it_alone(project: Project, path: dict[str, str]) -> None:
    before, run = project.files(), project.runs / ("path" if path else "folder")
    project.imports()
    model = project.runs / "model"
    shutil.copytree(resolve_model("numberline-tiny"), model, dirs_exist_ok=True)
    relative = f"policy.model={os.path.relpath(model, project.root)}"
    project.run("gflowvlm", "train", "--run", str(run), *SETTINGS, relative, **path)
    assert open_run(run)[1].policy.model == str(model)
    assert steps_taken(run) == [1, 2]
    assert (run / "summary.json").exists()
    assert_ours_and_theirs_are_kept_apart(project, on_path=bool(path))
    assert project.files() == before


def test_it_plays_and_serves_what_it_trained_and_goes_without_a_trace(project: Project) -> None:
    before, run = project.files(), project.runs / "path"
    played = project.runs / "played.json"
    project.python("-m", PACKAGE, "play", "numberline", "--player", str(run), "--json", str(played), PYTHONPATH=".")
    assert json.loads(played.read_text())
    project.imports()
    assert ask_once(project, run)
    assert_ours_and_theirs_are_kept_apart(project, on_path=True)

    # Were it another's, pip would look for it in the environment of the tests.
    assert f"Location: {project.packages}" in project.python("-m", "pip", "show", PACKAGE)
    project.python("-m", "pip", "uninstall", "--yes", PACKAGE)
    assert not (project.packages / PACKAGE).exists()
    assert not list(project.packages.glob(f"{PACKAGE}*"))
    assert project.files() == before
    assert project.where(*NAMES) == [project.root / name / "__init__.py" for name in NAMES]


def ask_once(project: Project, run: Path) -> str:
    """Serves a run's adapter from the project's folder, asks it once and ends it; returns what it answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = project.runs / "serve.log"
    server = subprocess.Popen(
        ["gflowvlm", "serve", str(run), "--version", "2", "--port", str(port), "sampler.engine=vllm"],
        cwd=project.root,
        env={**project.variables, "PYTHONPATH": ".", MARK: str(log)},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(lambda: "Ctrl-C ends it" in log.read_text(), "the address", server, log)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={"model": run.name, "messages": [{"role": "user", "content": _picture_and_prompt()}]},
            timeout=120,
        )
        assert answer.status_code == 200, answer.text
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=90) in (0, 130), log.read_text()[-4000:]
        assert_nothing_is_left(log)
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(timeout=90)
    return str(answer.json()["choices"][0]["message"]["content"])


def _picture_and_prompt() -> list[dict]:
    env = make_env(default_settings("numberline"))
    env.reset(seed=3)
    url = f"data:image/png;base64,{base64.b64encode(env.image_png()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": env.prompt()}]
