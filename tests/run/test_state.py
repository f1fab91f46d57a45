"""What a resumed run goes on with, and what a run of an older release has instead."""

import pytest

from gflowvlm.run.folder import RunFolder
from gflowvlm.run.log import append_row
from gflowvlm.run.state import SavedState, load_state, save_state
from gflowvlm.shared.errors import UserError


def test_what_was_saved_comes_back(tmp_path):
    folder = RunFolder(tmp_path)
    assert load_state(folder) == SavedState()
    state = SavedState(env_steps=12, response_tokens=345, due={8: 3, 4: 2}, evaluated=frozenset({0, 2}))
    save_state(folder, state)
    assert load_state(folder) == state
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_the_log_tells_nothing_to_a_run_that_has_its_state(tmp_path):
    folder = RunFolder(tmp_path)
    save_state(folder, SavedState(env_steps=5))
    append_row(folder.metrics, "rollout", {"step": 9, "env_steps": 500, "response_tokens": 5})
    append_row(folder.metrics, "evaluation", {"step": 9, "version": 3})
    assert load_state(folder) == SavedState(env_steps=5)


def test_a_run_of_an_older_release_goes_on_with_what_its_log_tells(tmp_path):
    folder = RunFolder(tmp_path)
    append_row(folder.metrics, "learner", {"step": 0})
    for step in (1, 2, 3):
        append_row(folder.metrics, "step", {"step": step, "version": step})
    append_row(folder.metrics, "evaluation", {"step": 2, "version": 2})
    append_row(folder.metrics, "rollout", {"step": 3, "env_steps": 50, "response_tokens": 700})
    append_row(folder.metrics, "learner", {"step": 2})
    expected = SavedState(env_steps=50, response_tokens=700, due={1: 1}, evaluated=frozenset({2}))
    assert load_state(folder) == expected


@pytest.mark.parametrize("content", ["{", '{"env_steps": -1}', '{"evaluated": [1], "other": 2}', "\x00", b"\xff"])
def test_a_damaged_state_is_one_line_that_says_what_to_do(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.state.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"state\.json: (damaged|cannot be read).*") as error:
        load_state(folder)
    assert "\n" not in str(error.value)
