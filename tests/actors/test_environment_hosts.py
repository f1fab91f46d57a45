"""Environments in processes of their own: the same episodes, deaths survived, nothing left behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.actors.environments import EnvironmentFailedError, EnvironmentLostError, LocalEnvironment
from gflowvlm.actors.episode import play_group
from gflowvlm.actors.groups import GroupRequest, PlaySettings
from gflowvlm.envs.household.generation import generate, specs
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.learner.tiny_policy import build_processor
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.task_settings import default_settings
from tests.actors.misbehaving import GOOD, KILLS, RAISES, SEEDS, MisbehavingSettings
from tests.actors.scripted import Texts

PLAY = PlaySettings(group_size=3, temperature=1.0, max_tokens=64, expert_on_failure=True)
REQUEST = GroupRequest(group_index=5, instance_seed=11)
TASK = NumberLineSettings(max_steps=4)

pytestmark = pytest.mark.slow


@pytest.fixture
def hosts() -> Iterator[EnvironmentHosts]:
    hosts = EnvironmentHosts(TASK, processes=2)
    yield hosts
    pids = hosts.pids
    hosts.close()
    assert hosts.pids == []
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_episodes_are_the_same_as_in_this_process_experts_included(hosts: EnvironmentHosts) -> None:
    inputs = PolicyInputs("numberline-test", build_processor())

    async def play(hosted: bool) -> list[object]:
        def open_environment() -> object:
            return hosts.open(REQUEST.group_index) if hosted else LocalEnvironment(make_env(TASK))

        source = Texts(inputs, ['{"thoughts": "on", "action": "+"}'])
        group = await play_group(open_environment, source, inputs, REQUEST, PLAY)
        return [replace(t, trajectory_id="", group_id="") for t in group.trajectories]

    async def both() -> tuple[list[object], list[object]]:
        return await play(hosted=True), await play(hosted=False)

    hosted, local = asyncio.run(both())
    assert len(hosted) == PLAY.group_size + 1
    # NaN, the log-probabilities of an expert, is not equal to itself.
    assert repr(hosted) == repr(local)


def test_the_event_loop_goes_on_while_an_environment_is_slow(hosts: EnvironmentHosts) -> None:
    async def longest_pause() -> float:
        environment = hosts.open(0)
        # The first call waits for the process to start and to import the task: seconds.
        starting = asyncio.create_task(environment.start(1, "id", [0]))
        longest, last = 0.0, time.perf_counter()
        while not starting.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        assert (await starting).prompt
        return longest

    started = time.perf_counter()
    longest = asyncio.run(longest_pause())
    assert longest < 0.5 * (time.perf_counter() - started)


def is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_lived_in_a_dead_process_is_lost_and_a_new_one_takes_its_place(hosts: EnvironmentHosts) -> None:
    async def body() -> None:
        one, other = hosts.open(0), hosts.open(1)
        await one.start(1, "id", [0])
        await other.start(1, "id", [0])
        before = hosts.pids
        os.kill(before[0], signal.SIGKILL)
        while not is_dead(before[0]):
            await asyncio.sleep(0.01)
        # Nobody's call was running.
        with pytest.raises(EnvironmentLostError, match=rf"^numberline/id/1: process {before[0]}.*killed by SIGKILL"):
            await one.act("+")
        with pytest.raises(EnvironmentLostError):
            await one.act("+")
        assert (await other.act("+")).end is None
        again = hosts.open(0)
        assert (await again.start(1, "id", [0])).end is None
        assert len(hosts.pids) == 2
        assert len({*before, *hosts.pids}) == 3
        for environment in (one, other, again):
            environment.close()

    asyncio.run(body())


def test_a_process_that_does_not_answer_is_replaced() -> None:
    hosts = EnvironmentHosts(TASK, processes=1, timeout_s=3.0)

    async def body() -> None:
        environment = hosts.open(0)
        deadline = time.monotonic() + 120
        while True:
            # On a busy machine the process may take longer than that to start.
            try:
                await environment.start(1, "id", [0])
                break
            except EnvironmentFailedError:
                assert time.monotonic() < deadline
        stopped = hosts.pids[0]
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(EnvironmentFailedError, match=r"^numberline/id/1: did not return in 3 s"):
            await environment.act("+")
        assert hosts.pids == []
        assert not psutil.pid_exists(stopped)

    try:
        asyncio.run(body())
    finally:
        hosts.close()


def named(seed: int) -> str:
    return f"numberline/id/{seed} (games/{seed}.json): "


def test_whatever_an_environment_raises_fails_it_alone_and_the_others_of_its_process_go_on() -> None:
    hosts = EnvironmentHosts(MisbehavingSettings(), processes=1)

    async def body() -> None:
        good = hosts.open(0)
        await good.start(GOOD, "id", [0])
        pids = hosts.pids
        for name, (_, reason) in RAISES.items():
            with pytest.raises(EnvironmentFailedError) as raised:
                await hosts.open(0).start(SEEDS[name], "id", [0])
            failure = str(raised.value)
            assert failure.startswith(named(SEEDS[name]) + reason)
            assert "\n" not in failure
            assert ("(it said: the planner says: object twice)" in failure) == (name == "SystemExit")
        with pytest.raises(EnvironmentFailedError, match="EOFError"):
            await hosts.open(0).start(SEEDS["input"], "id", [0])
        assert (await good.act("+")).task == "numberline"
        assert hosts.pids == pids

    try:
        asyncio.run(body())
    finally:
        hosts.close()


def test_a_household_game_that_the_planner_exits_at_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    if find_spec("alfworld") is None:
        pytest.skip("alfworld is not installed: make alfworld")
    folders = list(generate(tmp_path, specs({"train": 3, "valid_seen": 0, "valid_unseen": 0}, "small", seed=7), 1))
    damaged = folders[1] / "game.tw-pddl"
    game = json.loads(damaged.read_text())
    # As in some of ALFWorld's own: an object stands there twice.
    game["pddl_problem"] = game["pddl_problem"].replace("(:objects", "(:objects\nagent1 - agent\n", 1)
    damaged.write_text(json.dumps(game))
    hosts = EnvironmentHosts(default_settings("alfworld").model_copy(update={"games": str(tmp_path)}), processes=1)

    async def body() -> None:
        started = (hosts.open(0).start(seed, "id", [0]) for seed in range(3))
        outcomes = await asyncio.gather(*started, return_exceptions=True)
        (failure,) = (outcome for outcome in outcomes if isinstance(outcome, Exception))
        assert isinstance(failure, EnvironmentFailedError)
        assert str(damaged) in str(failure)
        assert "SystemExit: error: duplicate object 'agent1'" in str(failure)
        assert len(hosts.pids) == 1

    try:
        asyncio.run(body())
    finally:
        hosts.close()


def test_what_ends_its_process_is_named_and_the_others_are_lost_with_it() -> None:
    hosts = EnvironmentHosts(MisbehavingSettings(at_start=False), processes=1, timeout_s=10.0)

    async def body() -> None:
        for name, (_, reason) in KILLS.items():
            bad, good = hosts.open(0), hosts.open(0)
            await good.start(GOOD, "id", [0])
            await bad.start(SEEDS[name], "id", [0])
            # Both are asked in one moment; the good one waits for its turn.
            failed, lost = await asyncio.gather(bad.act("+"), good.act("+"), return_exceptions=True)
            assert isinstance(failed, EnvironmentFailedError)
            assert str(failed).startswith(named(SEEDS[name]))
            assert reason in str(failed)
            assert isinstance(lost, EnvironmentLostError)
            assert "another environment in it failed" in str(lost)
            assert hosts.pids == []

    try:
        asyncio.run(body())
    finally:
        hosts.close()


def test_a_call_that_nobody_waits_for_any_more_is_still_the_one_to_blame() -> None:
    hosts = EnvironmentHosts(MisbehavingSettings(at_start=False), processes=1, timeout_s=10.0)

    async def body() -> None:
        bad, good = hosts.open(0), hosts.open(0)
        await good.start(GOOD, "id", [0])
        await bad.start(SEEDS["a call without end"], "id", [0])
        given_up = asyncio.create_task(bad.act("+"))
        await asyncio.sleep(0.2)
        given_up.cancel()
        with pytest.raises(EnvironmentLostError):
            await good.act("+")
        await hosts.close_and_settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    try:
        asyncio.run(body())
    finally:
        hosts.close()


def test_calls_that_wait_when_the_processes_are_ended_end_with_them(hosts: EnvironmentHosts) -> None:
    async def body() -> None:
        environments = [hosts.open(0) for _ in range(4)]
        await asyncio.gather(*(environment.start(GOOD, "id", [0]) for environment in environments))
        acting = [asyncio.create_task(environment.act("+")) for environment in environments]
        await asyncio.sleep(0)
        for environment in environments:
            environment.close()
        await asyncio.sleep(0)
        await hosts.close_and_settle()
        for outcome in await asyncio.gather(*acting, return_exceptions=True):
            assert not isinstance(outcome, asyncio.CancelledError)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())


def test_the_output_of_an_environment_is_passed_on_up_to_a_limit(capfd: pytest.CaptureFixture[str]) -> None:
    hosts = EnvironmentHosts(MisbehavingSettings(), processes=1)

    async def body() -> None:
        with pytest.raises(EnvironmentFailedError):
            await hosts.open(0).start(SEEDS["output without end"], "id", [0])

    try:
        asyncio.run(body())
    finally:
        hosts.close()
    passed_on = capfd.readouterr().err
    assert 2**20 <= len(passed_on) < 2**20 + 200
    assert passed_on.endswith("(more output of this environment is not shown)\n")


OWNER = """
import asyncio, os, sys
from gflowvlm.actors.environment_hosts import EnvironmentHosts
from gflowvlm.envs.numberline.settings import NumberLineSettings

if __name__ == "__main__":
    hosts = EnvironmentHosts(NumberLineSettings(), 1)
    asyncio.run(hosts.open(0).start(1, "id", [0]))
    print(hosts.pids[0], flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_process_ends_with_its_owner_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert owner.returncode == -signal.SIGKILL, owner.stderr
    pid = int(owner.stdout)
    deadline = time.monotonic() + 20
    while not is_dead(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
