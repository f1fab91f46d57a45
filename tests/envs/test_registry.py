"""Names and settings lead to the right environment."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from gflowvlm.envs.blackjack.settings import BlackjackSettings
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import parse_config
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import TaskSettings, default_settings, register_task, task_names, task_settings_class

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("task", task_names())
def test_every_task_is_made_from_its_default_settings(task: str) -> None:
    settings = default_settings(task)
    assert settings.name == task
    env = make_env(settings)
    assert env.task == task
    assert env.settings == settings


@pytest.mark.parametrize("task", task_names())
def test_a_configuration_of_every_task_survives_being_written_and_read(task: str) -> None:
    config = RunConfig(task=default_settings(task))
    assert RunConfig.model_validate(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_that_names_no_task_is_numberlines() -> None:
    config = RunConfig.model_validate({"task": {"n_max": 7}})
    assert config.task == NumberLineSettings(n_max=7)
    assert RunConfig.model_validate({"task": {"name": "blackjack"}}).task == BlackjackSettings()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"n_max": 0}, r"task\.n_max = 0"),
        ({"name": "blackjack", "n_max": 3}, r"unknown key 'task\.n_max'(?!.*'task\.n_max')"),
        ({"name": "alfworld", "gmaes": 3}, r"unknown key 'task\.gmaes'; did you mean 'task\.games'\?"),
        ({"name": "numbersequence", "choices": 1}, r"task\.choices = 1"),
        ({"name": "chess"}, r"task\.name = 'chess'.*numberline, blackjack, numbersequence, alfworld"),
        ({"name": ["blackjack"]}, "task"),
        (3, "task = 3"),
    ],
)
def test_wrong_task_settings_are_named_by_their_key(task: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"task": task}, "file")


def test_settings_of_a_task_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        default_settings("blackjack").max_steps = 3


OWN_TASK = """
from typing import ClassVar, Literal
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.shared.task_settings import TaskSettings, register_task

class LakeSettings(TaskSettings):
    environment: ClassVar[str] = "lake:LakeEnv"
    measured_on: ClassVar[str] = "lakes"
    name: Literal["lake"] = "lake"
    holes: int = 2

class LakeEnv(NumberLineEnv):
    pass

register_task(LakeSettings)
"""

PROBE = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "write":
    import lake
    from gflowvlm.envs.registry import environment_class
    from gflowvlm.run.final_report import measured_on
    from gflowvlm.shared.config_io import parse_config
    config = parse_config({"task": {"name": "lake", "holes": 5}}, "file")
    assert environment_class(config.task) is lake.LakeEnv
    assert measured_on(["lake"]) == "lakes"
    sys.stdout.buffer.write(pickle.dumps(config))
else:
    config = pickle.loads(sys.stdin.buffer.read())
    assert config.task.holes == 5 and config.model_dump()["task"]["holes"] == 5
    assert type(config).model_validate(config.model_dump()) == config
"""


def test_a_new_task_needs_its_module_only_and_travels_to_other_processes(tmp_path: Path) -> None:
    (tmp_path / "lake.py").write_text(OWN_TASK)
    content = b""
    for step in ("write", "read"):
        content = subprocess.run(
            [sys.executable, "-c", PROBE, str(tmp_path), step],
            input=content,
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
            env={"PYTHONPATH": str(ROOT)},
        ).stdout


LEARNER_PROBE = """
import sys
for absent in ("gymnasium", "PIL", "numpy", "ray"):
    sys.modules[absent] = None
from gflowvlm.shared.config import RunConfig
for name in ("numberline", "blackjack", "numbersequence", "alfworld"):
    assert RunConfig.model_validate({"task": {"name": name}}).task.name == name
"""


def test_every_process_knows_the_shipped_tasks_without_their_environments() -> None:
    subprocess.run([sys.executable, "-c", LEARNER_PROBE], check=True, timeout=60, env={"PYTHONPATH": str(ROOT)})


def test_importing_the_package_names_the_tasks_and_loads_nothing() -> None:
    code = (
        "import sys, gflowvlm\n"
        "from gflowvlm.shared.task_registry import settings_place, task_names\n"
        "from importlib import import_module\n"
        "assert 'pydantic' not in sys.modules and 'numpy' not in sys.modules\n"
        "for name in task_names():\n"
        "    module, _, settings = settings_place(name).partition(':')\n"
        "    found = getattr(import_module(module), settings)\n"
        "    assert found.model_fields['name'].default == name\n"
        "assert len(task_names()) >= 4\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": str(ROOT)})


def test_two_tasks_cannot_have_one_name() -> None:
    class Other(NumberLineSettings):
        pass

    class Nameless(TaskSettings):
        pass

    with pytest.raises(ValueError, match=r"task 'numberline'.*NumberLineSettings has that name"):
        register_task(Other)
    with pytest.raises(ValueError, match=r"Nameless: declare name"):
        register_task(Nameless)
    register_task(NumberLineSettings)
    assert task_settings_class("numberline") is NumberLineSettings


def test_only_its_own_command_knows_a_task_from_outside() -> None:
    folders = {Path(inspect.getfile(task_settings_class(task))).parent.name for task in task_names()}
    rooms = [path for path in (ROOT / "gflowvlm").iterdir() if path.is_symlink() and path.name != "envs"]
    found = {
        str(file.relative_to(room.parent))
        for room in rooms
        for file in room.rglob("*.py")
        if re.search(rf"gflowvlm\.envs\.({'|'.join(folders)})\b", file.read_text(encoding="utf-8"))
    }
    assert found == {"cli/commands/alfworld.py"}
