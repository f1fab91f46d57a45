"""Playing a task outside a run: by hand, by the expert, at random, or by a policy."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gflowvlm.actors.sampling import PolicySampler, SampleRequest, UnknownVersionError
from gflowvlm.envs.base import SPLITS, TaskEnv
from gflowvlm.envs.registry import make_env
from gflowvlm.run.adapters import adapter_versions, published_adapter
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.models import resolve_model, shipped_models
from gflowvlm.run.paths import check_paths, with_absolute_paths
from gflowvlm.run.preset_library import load_preset
from gflowvlm.shared.config import PolicySettings, RunConfig
from gflowvlm.shared.config_io import load_config
from gflowvlm.shared.device import on_this_machine
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.task_settings import TaskSettings, default_settings
from gflowvlm.shared.trajectory import BASE_VERSION, EndReason

BUILT_IN_PLAYERS = ("human", "expert", "random")


@dataclass(frozen=True)
class Move:
    """What a player answers: the action, None when malformed, and the whole response where there is one."""

    action: str | None
    response: str = ""


@dataclass(frozen=True)
class Episode:
    """One played episode, as the JSON file lists it.

    Attributes:
        instance: ``task/split/seed``.
        success: Whether the final state solves the task.
        actions: One a response; None where the response was malformed.
        rewards: The task's own reward of every action.
        log_rewards: log R at every visited state, nats, before the exponent β.
        steps: Number of responses.
        end: Why it ended.
    """

    instance: str
    success: bool
    actions: list[str | None]
    rewards: list[float]
    log_rewards: list[float]
    steps: int
    end: EndReason


class Player(Protocol):
    """Chooses an action where the environment stands."""

    def act(self, env: TaskEnv) -> Move:
        """Returns the next move; EOFError ends playing."""


class ExpertPlayer:
    """The task's expert."""

    def act(self, env: TaskEnv) -> Move:
        """Returns the expert's action."""
        return Move(env.expert_action())


class RandomPlayer:
    """A uniformly random admissible action, the same for the same instance and step."""

    def act(self, env: TaskEnv) -> Move:
        """Returns a random action."""
        actions = env.admissible_actions
        return Move(actions[_step_seed(env) % len(actions)])


class PolicyPlayer:
    """A policy, sampled as in training; repeatable for the same instance and step."""

    def __init__(self, sampler: PolicySampler, config: RunConfig, version: int, loop: asyncio.Runner) -> None:
        self._sampler = sampler
        self._config = config
        self._version = version
        self._loop = loop

    def act(self, env: TaskEnv) -> Move:
        """Returns the policy's action and response."""
        request = SampleRequest(
            prompt=env.prompt(),
            image=env.shown(),
            max_tokens=self._config.policy.max_response_tokens,
            temperature=self._config.sampler.temperature,
            version=self._version,
            seed=_step_seed(env),
        )
        text = self._loop.run(self._sampler.sample(request)).text
        return Move(env.answer_format.parse(text).action, text)


@dataclass(frozen=True)
class RunPolicy:
    """Which policy a ``--player`` argument names.

    Attributes:
        config: The run's configuration, or the default one around a bare model directory.
        version: Adapter version; `BASE_VERSION` is the model without an adapter.
        adapter: The adapter's folder, None for the base model.
    """

    config: RunConfig
    version: int
    adapter: Path | None


def play_episodes(
    env: TaskEnv,
    player: Player,
    split: str,
    seeds: Iterator[int] | range,
    on_state: Callable[[int, TaskEnv], None],
    on_move: Callable[[TaskEnv, Move], None],
) -> Iterator[Episode]:
    """Plays one episode a seed; ends early and quietly when the player stops (EOF or Ctrl-C at the prompt).

    Args:
        env: The environment.
        player: Who plays.
        split: ``id`` or ``ood``.
        seeds: Instance seeds, in order.
        on_state: Called with the episode's number and the environment at every new state.
        on_move: Called after every move.
    """
    for number, seed in enumerate(seeds):
        env.reset(seed=seed, options={"split": split})
        on_state(number, env)
        actions: list[str | None] = []
        rewards: list[float] = []
        log_rewards = [env.log_reward]
        while env.end is None:
            try:
                move = player.act(env)
            except EOFError:
                return
            _, reward, _, _, _ = env.step("" if move.action is None else move.action)
            actions.append(move.action)
            rewards.append(reward)
            if env.end is not EndReason.DONE:
                log_rewards.append(env.log_reward)
            if env.end in (None, EndReason.ENVIRONMENT, EndReason.STEP_LIMIT):
                on_state(number, env)
            on_move(env, move)
        yield Episode(env.instance_id, env.success, actions, rewards, log_rewards, len(actions), env.end)


def task_env(settings: TaskSettings, split: str) -> TaskEnv:
    """Returns the task's environment.

    Raises:
        UserError: No such split, or a folder that the settings name is not there.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split!r}: there is no such split; use {' or '.join(SPLITS)}")
    settings = with_absolute_paths(settings)
    check_paths(settings)
    return make_env(settings)


def named_policy(player: str, task: str) -> RunPolicy:
    """Returns the policy that a run folder or model directory holds, or a shipped model under its preset's settings.

    Raises:
        UserError: It is neither, it is of another task, or its adapter is missing.
    """
    default = default_settings(task)
    root = Path(player).expanduser()
    if player in shipped_models():
        return RunPolicy(_of_task(load_preset(player), task, player), BASE_VERSION, None)
    if (root / "config.json").is_file():
        return RunPolicy(RunConfig(task=default, policy=PolicySettings(model=str(root.absolute()))), BASE_VERSION, None)
    folder = RunFolder(root)
    if not folder.config.is_file():
        raise UserError(
            f"--player {player!r}: neither a run folder, nor a model directory, nor one of "
            + ", ".join([*BUILT_IN_PLAYERS, *shipped_models()])
        )
    config = _of_task(load_config(folder.config), task, player)
    version = best_version(folder)
    if version == BASE_VERSION:
        return RunPolicy(config, version, None)
    return RunPolicy(config, version, published_adapter(folder, version))


def _of_task(config: RunConfig, task: str, player: str) -> RunConfig:
    if config.task.name != task:
        raise UserError(f"--player {player!r}: its task is {config.task.name!r}; play that one")
    return config


@contextmanager
def policy_player(policy: RunPolicy) -> Iterator[PolicyPlayer]:
    """Loads a policy and yields the player that samples it by transformers."""
    # Here, because the other players do without torch and its start-up time.
    import torch

    from gflowvlm.actors.transformers_sampler import TransformersSampler

    config = on_this_machine(policy.config, torch.cuda.is_available())
    sampler = TransformersSampler(config, resolve_model(config.policy.model))
    try:
        with asyncio.Runner() as loop:
            if policy.adapter is not None:
                try:
                    loop.run(sampler.load(policy.version, policy.adapter))
                except UnknownVersionError as error:
                    raise UserError(f"{error}; its run goes on: play again") from None
            yield PolicyPlayer(sampler, policy.config, policy.version, loop)
    finally:
        sampler.shutdown()


def write_picture(env: TaskEnv, number: int, folder: Path) -> Path:
    """Writes the current picture as ``episode_NNN_step_NN.png`` and returns its path.

    Raises:
        UserError: The folder cannot be made or written.
    """
    path = folder / f"episode_{number:03d}_step_{len(env.past_actions):02d}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(env.image_png())
    except OSError as error:
        raise UserError(f"--images {folder}: cannot be written ({error.strerror}); name another folder") from None
    return path


def _step_seed(env: TaskEnv) -> int:
    key = [env.instance_seed or 0, 3, SPLITS.index(env.split), len(env.past_actions)]
    return int(np.random.default_rng(key).integers(2**31))


def best_version(folder: RunFolder) -> int:
    """Returns the adapter version that evaluated best, else the newest, else the base model.

    Raises:
        UserError: The file that names the best cannot be read.
    """
    if folder.best.is_file():
        try:
            return int(json.loads(folder.best.read_text(encoding="utf-8"))["version"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder.best}: names no adapter version; remove it to use the newest adapter") from None
    return max(adapter_versions(folder), default=BASE_VERSION)
