"""A simulated learner: takes a given time for each batch, and computes nothing.

Its batches are real, as is the loop around it: pulling and prefetching batches, publishing adapters, reports.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gflowvlm.actors.adapter_store import CONFIG_FILE, WEIGHTS_FILE
from gflowvlm.cluster.driver.gpu_turns import GpuTurns
from gflowvlm.cluster.driver.learner_loop import LearnerJob, LearnerLoop
from gflowvlm.cluster.driver.learner_reports import RemoteMailbox, Reporter
from gflowvlm.run.folder import RunFolder
from gflowvlm.shared.trajectory import Trajectory

ADAPTER_TENSOR = "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight"


def simulated_learner_loop(job_values: dict[str, Any], *, step_s: float, adapter_kib: int) -> None:
    """Runs the loop of `gflowvlm.cluster.driver.learner_loop` around a `SimulatedLearner`, inside a Ray Train worker.

    Args:
        job_values: The fields of a `LearnerJob`.
        step_s: Time that a learner step takes, seconds.
        adapter_kib: Size of the adapters that are published.
    """
    job = LearnerJob(**job_values)
    reporter = Reporter(RemoteMailbox.find(job.mailbox_name))
    learner = SimulatedLearner(step_s, adapter_kib)
    LearnerLoop(job, RunFolder(Path(job.run_dir)), 0, learner, reporter, GpuTurns(None)).run()


class SimulatedLearner:
    """A `BatchLearner` without a model.

    Args:
        step_s: Time that a step takes, seconds.
        adapter_kib: Size of the adapters that it writes.
    """

    def __init__(self, step_s: float, adapter_kib: int) -> None:
        self._step_s = step_s
        self._weights = np.zeros((16, adapter_kib * 16), dtype=np.float32)
        self._steps = 0

    @property
    def steps_taken(self) -> int:
        """Batches taken so far."""
        return self._steps

    def step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Waits for the time of a step; the loss is always 0."""
        time.sleep(self._step_s)
        self._steps += 1
        tokens = sum(trajectory.response_tokens for trajectory in trajectories)
        return {"loss": 0.0, "trajectories": float(len(trajectories)), "response_tokens": float(tokens)}

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[list[float]]]:
        """Returns what the sampler said: the two agree."""
        return [[step.sampler_log_probs for step in trajectory.steps] for trajectory in trajectories]

    def enter_device(self) -> None:
        """Returns: there is no model to move."""

    def leave_device(self) -> None:
        """Returns: there is no model to move."""

    def save_adapter(self, directory: Path) -> None:
        """Writes an adapter of the right form and size, all of its weights zero."""
        write_simulated_adapter(directory, self._weights)

    def save(self, directory: Path) -> None:
        """Writes a checkpoint that holds the number of steps."""
        directory.mkdir(parents=True)
        (directory / "steps.json").write_text(json.dumps(self._steps), encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Restores a checkpoint."""
        self._steps = int(json.loads((directory / "steps.json").read_text(encoding="utf-8")))


def write_simulated_adapter(directory: Path, weights: np.ndarray) -> None:
    """Writes a folder in PEFT's format with one tensor, which the adapter store accepts."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": len(weights)}), encoding="utf-8")
    save_file({ADAPTER_TENSOR: weights}, directory / WEIGHTS_FILE)
