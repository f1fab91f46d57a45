"""Environments in this process: whatever their code raises or gives back fails their own episode, and says why."""

import asyncio
import threading

import pytest

from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.actors.environments import EnvironmentFailedError, LocalEnvironment, make_environment
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.shared.errors import UserError
from tests.actors import misbehaving
from tests.actors.misbehaving import ANSWERS, GOOD, RAISES, SEEDS, MisbehavingEnv, MisbehavingSettings


def failure_of(environment: LocalEnvironment, seed: int) -> str:
    """Why an episode of an instance fails, played beside the main thread as a rollout worker does."""
    caught: list[str] = []

    async def body() -> None:
        try:
            await environment.start(seed, "id", [0])
            await environment.act("+")
        except EnvironmentFailedError as error:
            caught.append(str(error))

    thread = threading.Thread(target=lambda: asyncio.run(body()))
    thread.start()
    thread.join(30)
    (failure,) = caught
    return failure


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize("name", RAISES)
def test_whatever_it_raises_fails_its_episode_with_instance_file_and_reason(name: str, at_start: bool) -> None:
    settings = MisbehavingSettings(at_start=at_start)
    failure = failure_of(LocalEnvironment(make_environment(settings)), SEEDS[name])
    assert failure == f"numberline/id/{SEEDS[name]} (games/{SEEDS[name]}.json): {RAISES[name][1]}"


@pytest.mark.parametrize("name", ANSWERS)
def test_nonsense_for_an_answer_is_a_failure_and_no_reward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute, value, reason = ANSWERS[name]
    monkeypatch.setattr(MisbehavingEnv, attribute, value)
    failure = failure_of(LocalEnvironment(make_environment(MisbehavingSettings())), GOOD)
    assert failure.startswith(f"numberline/id/{GOOD} (games/{GOOD}.json): {reason}")


def test_a_game_that_cannot_even_be_named_fails_with_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MisbehavingEnv, "source", lambda *_: misbehaving.leave_with_words())
    failure = failure_of(LocalEnvironment(make_environment(MisbehavingSettings())), GOOD)
    assert failure == f"numberline/id/{GOOD}: SystemExit: 37"


def test_one_that_cannot_be_closed_keeps_what_it_played(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = LocalEnvironment(make_environment(MisbehavingSettings()))
    monkeypatch.setattr(MisbehavingEnv, "close", lambda _: misbehaving.leave_with_words())
    environment.close()


def test_settings_that_allow_no_environment_are_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("task.games: no such folder")

    monkeypatch.setattr(MisbehavingEnv, "__init__", refuse)
    with pytest.raises(UserError, match=r"task\.games: no such folder") as raised:
        make_environment(MisbehavingSettings())
    assert not isinstance(raised.value, EnvironmentFailedError)
    monkeypatch.setattr(MisbehavingEnv, "__init__", lambda *_: misbehaving.leave_with_words())
    with pytest.raises(EnvironmentFailedError, match="SystemExit: 37"):
        make_environment(MisbehavingSettings())


def test_ctrl_c_in_the_main_thread_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = LocalEnvironment(make_environment(MisbehavingSettings()))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(environment.start(SEEDS["KeyboardInterrupt"], "id", [0]))


def test_a_generated_instance_is_named_by_its_id_alone() -> None:
    environment = LocalEnvironment(make_environment(NumberLineSettings()))

    async def body() -> None:
        await environment.start(3, "ood", [0])
        environment._slot.env.end = None
        environment._slot.env.instance_seed = None
        with pytest.raises(EnvironmentFailedError, match=r"^numberline/ood/3: ResetNeeded"):
            await environment.act("+")

    asyncio.run(body())


def test_without_processes_environments_run_in_this_one() -> None:
    hosts = EnvironmentHosts(NumberLineSettings(), processes=0)
    environment = hosts.open(3)
    assert asyncio.run(environment.start(1, "id", [0])).prompt
    assert isinstance(environment, LocalEnvironment)
    assert hosts.pids == []
    hosts.close()
