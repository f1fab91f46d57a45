"""A user's modules are found where they are, by every process of a run, and what they raise names their line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.user_code import CODE_VARIABLE, load_own, run_own_code, use_code_folder, used_code_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(CODE_VARIABLE, "")
    before = set(sys.modules)
    (tmp_path / "own_helper.py").write_text("FACTOR = 2\n")
    (tmp_path / "own_rewards.py").write_text("import own_helper\n\ndef fn(x):\n    return own_helper.FACTOR / x\n")
    (tmp_path / "own_broken.py").write_text("a = 1\nb = a +\n")
    (tmp_path / "own_raising.py").write_text("\nraise SystemExit(3)\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_in_the_folder_is_found_with_its_neighbours_and_from_then_on_in_child_processes(folder):
    assert load_own("own_rewards:fn", "task.reward", folder)(4) == 0.5
    assert used_code_folder() == folder
    code = "import gflowvlm.shared.user_code, own_rewards; print(own_rewards.fn(1))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert child.stdout == "2.0\n", child.stderr


def test_a_folder_in_which_nothing_is_named_is_not_imported_from(folder):
    load_own("json:dumps", "task.reward", folder)
    assert used_code_folder() is None
    assert str(folder) not in sys.path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fn", "write module:Name"),
        ("own_rewards:", "write module:Name"),
        ("own_nothing:fn", "there is no module 'own_nothing' in .*; write own_nothing.py there"),
        ("own_rewards:gn", "own_rewards.py has no gn"),
        ("own_broken:fn", r"cannot be imported \(SyntaxError: .*own_broken.py, line 2"),
        ("own_raising:fn", r"cannot be imported \(SystemExit: 3; .*own_raising.py, line 2\)"),
    ],
)
def test_what_cannot_be_had_is_one_line_that_names_setting_and_place(folder, name, said):
    with pytest.raises(UserError, match=said) as caught:
        load_own(name, "task.reward", folder)
    assert str(caught.value).startswith(f"task.reward = {name!r}: ")
    assert "\n" not in str(caught.value)


def test_a_name_that_something_installed_has_is_refused(folder):
    (folder / "yaml.py").write_text("fn = 1\n")
    with pytest.raises(UserError, match=r"installed under the name of your yaml\.py; rename yours"):
        load_own("yaml:fn", "task.reward", folder)


def test_what_own_code_raises_names_its_line(folder):
    own = load_own("own_rewards:fn", "task.reward", folder)
    with pytest.raises(UserError, match=r"reward fails \(ZeroDivisionError: .*own_rewards.py, line 4\)"):
        run_own_code(own, "reward fails", 0)


def test_a_configuration_notes_the_folder_that_it_names_code_in_and_uses_it_again(folder):
    assert RunConfig().code is None
    assert RunConfig(code=str(folder)).code == str(folder)
    assert used_code_folder() == folder
    assert RunConfig().code == str(folder)


def test_a_folder_that_is_used_comes_after_what_is_installed(folder):
    use_code_folder(folder)
    use_code_folder(folder)
    assert sys.path.index(str(folder)) == len(sys.path) - 1
