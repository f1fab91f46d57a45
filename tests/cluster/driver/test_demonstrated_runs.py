"""A run with demonstrations, part by part: what it plays, what reaches the buffer, what the learner makes of it."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from gflowvlm.actors.buffer_actor import Acknowledgement
from gflowvlm.actors.demonstration_set import DemonstrationSet
from gflowvlm.actors.groups import GroupRequest, GroupSummary
from gflowvlm.actors.replay_buffer import ReplayBuffer
from gflowvlm.actors.rollout_worker import RolloutWorker
from gflowvlm.cluster.driver.training_run import TrainingRun
from gflowvlm.learner.learner import Learner
from gflowvlm.run.folder import RunFolder
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.config import BufferSettings, RunConfig
from gflowvlm.shared.trajectory import from_arrow
from tests.actors.made_demonstrations import files, make_set, truncate
from tests.actors.scripted import Fixed

MODEL = resolve_model("numberline-tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DemonstrationSet:
    return make_set(tmp_path_factory.mktemp("sets") / "numberline")


class Buffer:
    """A replay buffer in this process, called as its actor is."""

    def __init__(self) -> None:
        self.held = ReplayBuffer(BufferSettings(), 0, None)

    @property
    def append(self) -> "Buffer":
        return self

    async def remote(self, batch: pa.RecordBatch) -> Acknowledgement:
        return Acknowledgement(self.held.append(batch), self.held.accepted)


def config_of(made: DemonstrationSet, **sections: dict[str, Any]) -> RunConfig:
    rollout = {"group_size": 3, **sections.pop("rollout", {}), "demonstrations": str(made.folder)}
    return RunConfig.model_validate({"rollout": rollout, "learner": {"warmup_steps": 0}, **sections})


def sampled(config: RunConfig, seeds: list[int]) -> tuple[list[GroupSummary], ReplayBuffer]:
    buffer, source = Buffer(), Fixed(MODEL)
    worker = RolloutWorker(run_config=config, model_path=MODEL, source=source, buffer=buffer)
    try:
        return worker.sample(requests=[GroupRequest(i, seed) for i, seed in enumerate(seeds)]), buffer.held
    finally:
        worker.stop()


def test_a_run_plays_the_demonstrated_instances(made: DemonstrationSet, tmp_path: Path) -> None:
    config = config_of(made)
    run = TrainingRun(RunFolder(tmp_path), config, Console(quiet=True))
    played = [run._instance_seed(index) for index in range(12)]
    assert sorted(played[:6]) == sorted(played[6:]) == made.instance_seeds
    other = TrainingRun(RunFolder(tmp_path), RunConfig(), Console(quiet=True))
    assert not {other._instance_seed(index) for index in range(12)} & set(made.instance_seeds)


def test_a_demonstration_joins_its_instances_group_in_the_buffer(made: DemonstrationSet) -> None:
    seeds = made.instance_seeds[:2]
    summaries, buffer = sampled(config_of(made), seeds)
    assert [s.failure for s in summaries] == [None, None]
    # It was not played: no environment step, no rollout's success.
    assert [s.expert for s in summaries] == [[False] * 3] * 2
    groups = from_arrow(buffer.content())
    for seed, summary in zip(seeds, summaries, strict=True):
        *own, expert = [t for t in groups if t.instance_seed == seed]
        assert [t.expert for t in own] == [False] * 3
        assert (expert.expert, expert.success, expert.group_id) == (True, True, summary.group_id)
        assert expert.actions == made.find(seed).actions
        assert expert.instance_id == own[0].instance_id
    stats = buffer.stats()
    assert (stats["accepted"], stats["accepted_experts"], stats["size"]) == (6, 2, 8)


def test_imitation_learns_from_the_set_and_nothing_is_played(made: DemonstrationSet) -> None:
    config = config_of(made, objective={"loss": "sft"}, rollout={"group_size": 1, "expert_on_failure": True})
    summaries, buffer = sampled(config, made.instance_seeds)
    assert all(s.failure is None and s.trajectory_ids == [] for s in summaries)
    held = from_arrow(buffer.content())
    assert sorted(t.instance_seed for t in held) == made.instance_seeds
    assert all(t.expert for t in held)
    assert buffer.accepted == len(summaries) * config.rollout.group_size


def test_a_set_that_was_damaged_meanwhile_ends_the_run_with_its_name(made: DemonstrationSet, tmp_path: Path) -> None:
    own = make_set(tmp_path, trajectories=2)
    truncate(files(tmp_path)[0])
    (summary,), buffer = sampled(config_of(own), own.instance_seeds[:1])
    assert summary.permanent
    assert "00000000.parquet" in str(summary.failure)
    assert buffer.accepted == 0


@pytest.mark.parametrize("loss", ["var_tb", "subtb", "db", "sft"])
def test_the_learner_learns_from_what_was_demonstrated(loss: str, made: DemonstrationSet) -> None:
    config = config_of(made, objective={"loss": loss}, rollout={"group_size": 1} if loss == "sft" else {})
    _, buffer = sampled(config, made.instance_seeds[:2])
    batch = from_arrow(buffer.sample(0, 2, 0))
    learner = Learner(config, MODEL)
    before, after = learner.step(batch), learner.step(batch)
    assert before["trajectories_used"] == len(batch) == (2 if loss == "sft" else 8)
    assert math.isfinite(before["loss"])
    assert after["loss"] != before["loss"]
    assert before["updated"] == 1.0
