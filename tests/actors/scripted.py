"""Response sources whose answers a test decides, and groups played with them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from gflowvlm.actors.environments import LocalEnvironment
from gflowvlm.actors.episode import PlayedGroup, play_group
from gflowvlm.actors.groups import GroupRequest, PlaySettings
from gflowvlm.actors.sampling import SampleRequest, SampleResponse
from gflowvlm.envs.base import TaskEnv
from gflowvlm.envs.numberline.settings import NumberLineSettings
from gflowvlm.envs.registry import make_env
from gflowvlm.shared.policy_inputs import PolicyInputs


@dataclass
class Texts:
    """Answers with texts in turn, the last one for ever.

    Attributes:
        tokenise: Turns a text into tokens; the demonstrations' way when None.
    """

    inputs: PolicyInputs
    texts: list[str]
    version: int = 3
    tokenise: Callable[[str], list[int]] | None = None
    requests: list[SampleRequest] = field(default_factory=list)

    async def sample(self, request: SampleRequest) -> SampleResponse:
        text = self.texts[min(len(self.requests), len(self.texts) - 1)]
        self.requests.append(request)
        token_ids = (self.tokenise or self.inputs.encode_response)(text)
        return SampleResponse(token_ids, [-0.25] * len(token_ids), text, self.version)


@dataclass
class Player:
    """Plays by looking into the environments that it hands out.

    Attributes:
        choose: The action at an environment's state.
        together: The largest number of requests that waited at the same time.
    """

    inputs: PolicyInputs
    choose: Callable[[TaskEnv], str] = lambda env: env.expert_action()
    settings: NumberLineSettings = NumberLineSettings()  # noqa: RUF009 - frozen
    version: int = 3
    envs: list[TaskEnv] = field(default_factory=list)
    requests: list[SampleRequest] = field(default_factory=list)
    together: int = 0
    waiting: int = 0

    def make_env(self) -> TaskEnv:
        self.envs.append(make_env(self.settings))
        return self.envs[-1]

    async def sample(self, request: SampleRequest) -> SampleResponse:
        self.requests.append(request)
        self.waiting += 1
        self.together = max(self.together, self.waiting)
        await asyncio.sleep(0.001)
        self.waiting -= 1
        env = next(e for e in self.envs if e.prompt() == request.prompt and e.image_png() == request.image)
        text = env.demonstration(self.choose(env), np.random.default_rng(len(self.requests)))
        token_ids = self.inputs.encode_response(text)
        return SampleResponse(token_ids, [-0.25] * len(token_ids), text, self.version)


@dataclass
class Fixed:
    """Answers with one text, after a pause; can travel to another process.

    Attributes:
        error: What requests raise whose prompt contains `fails_on`.
        together: The largest number of requests that waited at the same time.
    """

    model_path: str
    text: str = '{"thoughts": "on", "action": "+"}'
    pause_s: float = 0.0
    version: int = 3
    error: Exception | None = None
    fails_on: str = ""
    together: int = 0
    waiting: int = 0
    requests: list[SampleRequest] = field(default_factory=list)

    async def sample(self, request: SampleRequest) -> SampleResponse:
        if self.error is not None and self.fails_on in request.prompt:
            raise self.error
        self.requests.append(request)
        self.waiting += 1
        self.together = max(self.together, self.waiting)
        await asyncio.sleep(self.pause_s)
        self.waiting -= 1
        token_ids = _inputs(self.model_path).encode_response(self.text)
        version = self.version if request.version is None else request.version
        return SampleResponse(token_ids, [-0.25] * len(token_ids), self.text, version)


@cache
def _inputs(model_path: str) -> PolicyInputs:
    return PolicyInputs.load(model_path)


PLAY = PlaySettings(group_size=4, temperature=1.0, max_tokens=64)
REQUEST = GroupRequest(group_index=5, instance_seed=11)


def play(
    source: Any,
    inputs: PolicyInputs,
    request: GroupRequest = REQUEST,
    task: NumberLineSettings | None = None,
    **changed: Any,
) -> PlayedGroup:
    """Plays a group of `PLAY`, changed, in environments of this process."""
    make = source.make_env if isinstance(source, Player) else lambda: make_env(task or NumberLineSettings())
    return asyncio.run(play_group(lambda: LocalEnvironment(make()), source, inputs, request, replace(PLAY, **changed)))
