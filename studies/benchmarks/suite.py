"""Runs the chosen parts, with Ray where one of them needs it."""

import time
from contextlib import ExitStack

from rich.console import Console

from gflowvlm.cluster.launch.ray_runtime import ray_cluster
from gflowvlm.run.models import resolve_model
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.policy_inputs import PolicyInputs
from gflowvlm.studies.benchmarks.measurement import PARTS, SIMULATED_PARTS, Measurement, Say, Scale
from gflowvlm.studies.benchmarks.quiet import quiet_stderr

_NEED_ENGINE = {"sampler", "serve", "adapter"}
_NEED_RAY = {"serve", "adapter", "replay"}


def run_parts(config: RunConfig, parts: set[str], scale: Scale, console: Console) -> list[Measurement]:
    """Measures the chosen parts, one after another; a part that is not chosen is not even imported.

    Raises:
        UserError: The model, the engine or Ray cannot be had here.
    """
    with quiet_stderr():
        measurements = _measured(config, parts, scale, console)
    return sorted(measurements, key=lambda measurement: PARTS.index(measurement.part))


def _measured(config: RunConfig, parts: set[str], scale: Scale, console: Console) -> list[Measurement]:
    began = time.perf_counter()
    model_path = resolve_model(config.policy.model)
    if parts != {"environment"}:
        # A missing model is told before anything is started.
        PolicyInputs.load(model_path)
    measurements: list[Measurement] = []

    def progress_printer(part: str) -> Say:
        def say(text: str) -> None:
            console.print(f"[{time.perf_counter() - began:5.0f} s] {part}: {text}", highlight=False, markup=False)

        return say

    if "environment" in parts:
        from gflowvlm.studies.benchmarks.environments import bench_environment

        measurements += bench_environment(config, scale, progress_printer("environment"))
    if "learner" in parts:
        from gflowvlm.studies.benchmarks.learning import bench_learner

        measurements += bench_learner(config, model_path, scale, progress_printer("learner"))
    with ExitStack() as stack:
        if parts & _NEED_RAY:
            progress_printer("ray")("starting")
            stack.enter_context(ray_cluster(config))
        if "replay" in parts:
            from gflowvlm.studies.benchmarks.replay import bench_replay

            measurements += bench_replay(config, model_path, scale, progress_printer("replay"))
        if parts & _NEED_ENGINE:
            from gflowvlm.studies.benchmarks.serving import bench_serving

            measurements += bench_serving(config, model_path, parts & _NEED_ENGINE, scale, progress_printer("sampler"))
        if parts & _NEED_RAY:
            progress_printer("ray")("stopping")
    simulated = parts & set(SIMULATED_PARTS)
    if simulated:
        from gflowvlm.studies.benchmarks.scale import SimulatedRuns

        measurements += SimulatedRuns(config, model_path, scale.simulated, progress_printer("simulated")).measured(
            simulated
        )
    return measurements
