"""Making sets of demonstrations: what the expert plays, what is kept, repeatability, going on, refusals."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gflowvlm.actors.demonstration_set import DemonstrationRequest, DemonstrationSet
from gflowvlm.envs.household.generation import generate, specs
from gflowvlm.envs.numberline.environment import NumberLineEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.run.folder_lock import LOCK, folder_lock
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import default_settings
from gflowvlm.shared.trajectory import EndReason, Validity
from gflowvlm.warm_starts import recording
from gflowvlm.warm_starts.recording import make_demonstrations
from tests.actors.made_demonstrations import content, files, make_set, stored
from tests.shared.json_answers import parse_response

TASKS = ("numberline", "blackjack", "numbersequence")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["id", "ood"])
def test_the_experts_successes_are_recorded(task: str, split: str, tmp_path: Path) -> None:
    made = make_set(tmp_path, task, split=split, seed=3)
    found = list(made.trajectories())
    assert len(found) == 6
    assert all(t.expert and t.success and (t.task, t.split) == (task, split) for t in found)
    assert len({t.trajectory_id for t in found}) == len({t.group_id for t in found}) == 6
    assert made.figures.responses == sum(len(t.steps) for t in found)
    env = make_env(made.request.task)
    for trajectory in found:
        env.reset(seed=trajectory.instance_seed, options={"split": split})
        for step in trajectory.steps:
            assert (step.prompt, trajectory.images[step.image]) == (env.prompt(), env.image_png())
            assert step.action == env.expert_action()
            assert step.response_text in env.demonstrations(env.expert_action())
            env.step(step.action)
        assert (env.end, env.outcome) == (trajectory.end, trajectory.outcome)


def test_blackjacks_losses_are_counted_and_kept_only_when_asked_for(tmp_path: Path) -> None:
    won = make_set(tmp_path / "won", "blackjack", trajectories=40)
    every = make_set(tmp_path / "every", "blackjack", trajectories=40, failures=True)
    assert every.figures.played == 40
    assert 0.2 < every.figures.success < 0.65
    assert won.figures.played > 60
    assert won.figures.success == 40 / won.figures.played
    assert [t.success for t in every.trajectories()].count(True) == round(40 * every.figures.success)
    by_seed = {t.instance_seed: t for t in won.trajectories()}
    both = [by_seed[seed] for seed in by_seed if seed < every.request.first_instance + 40]
    # Their log-probabilities are NaN, which equals nothing.
    assert repr([t for t in every.trajectories() if t.success]) == repr(both)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1.0), (0.5, 0.5 + 0.5 / 3), (1.0, 1 / 3)])
def test_noise_is_the_share_of_random_actions(noise: float, expected: float, tmp_path: Path) -> None:
    made = make_set(tmp_path, trajectories=100, noise=noise, failures=True)
    env, experts, all_of_them = make_env(made.request.task), 0, 0
    for trajectory in made.trajectories():
        env.reset(seed=trajectory.instance_seed)
        for step in trajectory.steps:
            assert step.validity is Validity.VALID
            assert step.response_text in env.demonstrations(str(step.action))
            experts += step.action == env.expert_action()
            all_of_them += 1
            env.step(str(step.action))
        assert trajectory.end in (EndReason.DONE, EndReason.STEP_LIMIT)
    assert experts / all_of_them == pytest.approx(expected, abs=0.08)


def test_wordings_and_instances_depend_on_the_seed(tmp_path: Path) -> None:
    one, two = (list(make_set(tmp_path / str(seed), seed=seed).trajectories()) for seed in (0, 1))
    assert not {t.instance_seed for t in one} & {t.instance_seed for t in two}
    thoughts = {parse_response(step.response_text).thoughts.translate(_NO_DIGITS) for t in one for step in t.steps}
    assert len(thoughts) > 3


_NO_DIGITS = str.maketrans("", "", "0123456789")


def test_the_same_request_makes_the_same_files(tmp_path: Path) -> None:
    options: dict[str, Any] = {"trajectories": 70, "noise": 0.3, "seed": 5}
    make_set(tmp_path / "one", **options)
    make_set(tmp_path / "two", **options)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(files(tmp_path / "one")) > 1
    make_set(tmp_path / "three", **{**options, "noise": 0.31})
    assert content(tmp_path / "one") != content(tmp_path / "three")


def test_a_stopped_set_is_gone_on_with_and_becomes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "CHUNK", 8)
    options: dict[str, Any] = {"trajectories": 20, "noise": 0.4}
    make_set(tmp_path / "whole", **options)

    def stop(there: int) -> None:
        if there >= 8:
            raise KeyboardInterrupt

    request = DemonstrationRequest(task=default_settings("numberline"), **options)
    with pytest.raises(KeyboardInterrupt):
        make_demonstrations(request, tmp_path / "stopped", stop, print)
    written = len(files(tmp_path / "stopped"))
    assert 0 < written < len(files(tmp_path / "whole"))
    with pytest.raises(UserError, match="not finished"):
        DemonstrationSet(tmp_path / "stopped")
    (tmp_path / "stopped" / "trajectories" / f"{written:08d}.parquet.partial").write_bytes(b"half a file")

    seen: list[int] = []
    make_demonstrations(request, tmp_path / "stopped", seen.append, print)
    assert 8 <= seen[0] < 20 == seen[-1]
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_a_finished_set_is_left_as_it_is(tmp_path: Path) -> None:
    make_set(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_set(tmp_path).figures.played == 6
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


@pytest.mark.parametrize(
    ("changed", "named"), [({"seed": 1}, "seed"), ({"noise": 0.1}, "noise"), ({"task": "blackjack"}, "task")]
)
def test_a_set_made_otherwise_is_refused_and_left_alone(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    make_set(tmp_path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"made with another {named}"):
        make_set(tmp_path, **changed)
    assert content(tmp_path) == before


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty"):
        make_set(tmp_path)
    assert content(tmp_path) == {"letter.txt": b"dear"}


def test_a_set_that_is_being_made_is_left_alone(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path, UserError("held")),
        pytest.raises(UserError, match="another `gflowvlm demonstrate` is writing there"),
    ):
        make_set(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    make_set(tmp_path)


def test_an_expert_that_never_succeeds_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_WITHOUT_SUCCESS", 64)
    hopeless = default_settings("numberline").model_copy(update={"max_steps": 1, "ood_max_distance": 40, "n_max": 99})
    with pytest.raises(UserError, match="lower --noise, or keep what fails with --failures"):
        make_set(tmp_path, task=hopeless, trajectories=60)


@pytest.mark.slow
def test_household_tasks_are_played_in_processes_of_their_own_and_repeatably(tmp_path: Path) -> None:
    if find_spec("alfworld") is None:
        pytest.skip("alfworld is not installed: make alfworld")
    games = tmp_path / "games"
    list(generate(games, specs({"train": 2, "valid_seen": 0, "valid_unseen": 0}, "small", seed=7), workers=1))
    settings = default_settings("alfworld").model_copy(update={"games": str(games), "prompt": "markov"})
    made = make_set(tmp_path / "one", task=settings, trajectories=4)
    assert made.figures.success == 1.0
    assert all(t.success and t.end is EndReason.DONE for t in made.trajectories())
    assert len({t.steps[0].prompt for t in stored(made.folder)}) == 2
    make_set(tmp_path / "two", task=settings, trajectories=4)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_instances_whose_environment_fails_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = NumberLineEnv._start

    def exit_at_some(env: NumberLineEnv, rng: np.random.Generator) -> None:
        if env.instance_seed is not None and env.instance_seed % 3 == 0:
            sys.exit(3)
        start(env, rng)

    monkeypatch.setattr(NumberLineEnv, "_start", exit_at_some)
    failures: list[str] = []
    request = DemonstrationRequest(task=default_settings("numberline"), trajectories=6)
    made = make_demonstrations(request, tmp_path, lambda _: None, failures.append)
    assert failures
    assert all(f == f"numberline/id/{int(f.split('/')[2].split(':')[0]) // 3 * 3}: SystemExit: 3" for f in failures)
    assert len(made.instance_seeds) == 6
    assert all(seed % 3 for seed in made.instance_seeds)


def test_a_task_of_which_nothing_can_be_played_is_given_up_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumberLineEnv, "_start", lambda *_: sys.exit("no planner"))
    failures: list[str] = []
    request = DemonstrationRequest(task=default_settings("numberline"))
    with pytest.raises(UserError, match=r"^numberline/id/\d+: SystemExit: no planner$"):
        make_demonstrations(request, tmp_path, lambda _: None, failures.append)
    assert len(failures) == recording.MAX_FAILED_AT_START
