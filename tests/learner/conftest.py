"""A tiny policy with random weights, and trajectories made by hand, for the learner's tests."""

import io
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gflowvlm.learner.tiny_policy import build_tiny_policy
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.shared.trajectory import EndReason, Step, Trajectory, Validity
from tests.shared.json_answers import format_response


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny Idefics3 with random weights."""
    return str(build_tiny_policy(tmp_path_factory.mktemp("tiny"), seed=1))


@pytest.fixture(scope="session")
def tiny_inputs(tiny_model: str) -> PolicyInputs:
    return PolicyInputs.load(tiny_model)


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """Returns a maker of configurations: ``make_config(objective={...}, learner={...})``."""

    def make(**sections: Any) -> RunConfig:
        sections.setdefault("learner", {})
        sections["learner"] = {"steps": 20, "warmup_steps": 0, **sections["learner"]}
        return RunConfig.model_validate(sections)

    return make


class TrajectoryMaker:
    """Makes trajectories out of action strings; None stands for a malformed response."""

    def __init__(self, inputs: PolicyInputs) -> None:
        self.inputs = inputs
        self.made = 0

    def step(self, action: str | None, history: Sequence[str | None], state: int) -> Step:
        if action is None:
            text = '{"current": 1, "thoughts": ' + "so " * (1 + state)
        else:
            thoughts = ["1 is below 2", "1 is less than 2, so up", "it equals the target"][self.made % 3]
            text = format_response(action, thoughts, {"current": state, "target": 4})
        ids = self.inputs.encode_response(text)
        layout = self.inputs.read(ids).layout
        valid = action in ("+", "-", "[DONE]")
        return Step(
            prompt="Move to the target. " + " ".join(f"Action {i}: {a}" for i, a in enumerate(history)),
            image=state,
            response_ids=ids,
            response_text=text,
            cot_end=layout.cot_end,
            action_end=layout.action_end,
            sampler_log_probs=[math.nan] * len(ids),
            policy_version=0,
            action=action,
            validity=Validity.VALID if valid else Validity.MALFORMED if action is None else Validity.INADMISSIBLE,
            stop_ids=layout.stop_ids,
        )

    def __call__(
        self, actions: Sequence[str | None], end: EndReason, instance: int = 0, log_rewards: Sequence[float] = ()
    ) -> Trajectory:
        self.made += 1
        rng = np.random.default_rng(self.made)
        n = len(actions) - (end is EndReason.DONE)
        rewards = list(log_rewards) or [*rng.uniform(2.0, 4.6, size=n + 1)]
        if not log_rewards and end is EndReason.INVALID:
            rewards[-1] = 0.0
        # As in a run: trajectories of an instance that have done the same see the same.
        images = [picture(instance, actions[:i]) for i in range(max(1, len(actions)))]
        return Trajectory(
            trajectory_id=f"t{self.made}",
            group_id=f"g{instance}",
            instance_id=f"numberline/id/{instance}",
            instance_seed=instance,
            task="numberline",
            split="id",
            steps=[self.step(a, actions[:i], i) for i, a in enumerate(actions)],
            images=images,
            log_rewards=[float(r) for r in rewards],
            original_rewards=[0.0] * len(actions),
            end=end,
            success=end is EndReason.DONE,
            outcome="4",
            expert=False,
        )

    def batch(self, instances: int = 2) -> list[Trajectory]:
        """Four trajectories per instance, of every end there is."""
        made = []
        for i in range(instances):
            made += [
                self(["+", "-", "[DONE]"], EndReason.DONE, i),
                self(["+"] * (2 + i), EndReason.STEP_LIMIT, i),
                self(["-", None], EndReason.INVALID, i),
                self(["jump"], EndReason.INVALID, i),
            ]
        return made


def picture(instance: int, history: Sequence[str | None]) -> bytes:
    """Returns a picture of noise that is the same for the same history."""
    rng = np.random.default_rng(zlib.crc32(repr((instance, list(history))).encode()))
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def make_trajectory(tiny_inputs: PolicyInputs) -> TrajectoryMaker:
    return TrajectoryMaker(tiny_inputs)
