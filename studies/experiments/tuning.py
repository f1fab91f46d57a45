"""Running trials through Ray Tune, on a Ray of its own that only keeps count of them."""

import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback

from gflowvlm.cluster.launch.local_ray import start_local_ray
from gflowvlm.cluster.launch.ray_runtime import worker_environment
from gflowvlm.studies.experiments.trial_process import TrialJob, run_trial
from gflowvlm.studies.experiments.trials import Trial

_OBJECT_STORE_BYTES = 80 * 2**20
"""About the least that Ray accepts."""

_TUNE_ENVIRONMENT = {
    # Ctrl-C is the caller's: Tune would end the trials' processes at once, and the runs in them.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The newer output prints some whatever its verbosity; of the older nothing is left but `_Watch`.
    "RAY_AIR_NEW_OUTPUT": "0",
    # The run folders hold what there is to log.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


class _Watch(TrialProgressCallback):
    """Tells which trials run, and how often each has failed so far, many times a second.

    It stands in for the callback that prints Tune's own account of the trials, and prints nothing.
    """

    def __init__(self, on_step: Callable[[Sequence[str], Mapping[str, int]], None]) -> None:
        super().__init__()
        self._on_step = on_step

    def __getstate__(self) -> dict[str, Any]:
        """Returns nothing: Tune writes its callbacks down, but a screen cannot be, and nobody reads them here."""
        return {}

    def on_trial_result(self, *where: Any, **info: Any) -> None:
        """Called by Tune."""

    def on_trial_error(self, *where: Any, **info: Any) -> None:
        """Called by Tune."""

    def on_trial_complete(self, *where: Any, **info: Any) -> None:
        """Called by Tune."""

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune."""
        running = [trial.config["trial"] for trial in trials if trial.status == "RUNNING"]
        self._on_step(running, {trial.config["trial"]: trial.num_failures for trial in trials})


def run_trials(
    trials: Sequence[Trial],
    stop: Path,
    on_step: Callable[[Sequence[str], Mapping[str, int]], None],
    *,
    concurrent: int,
    retries: int,
) -> None:
    """Runs trials to their end, to their last failure, or until they are to stop.

    What they reached is in their folders, which alone say what is finished: Tune's own notes are thrown away.

    Args:
        trials: Unfinished trials; their folders are there.
        stop: The file that says that they are to stop, once it is there.
        on_step: Called many times a second with the names of those that run, and the failures of each so far.
        concurrent: How many run at a time.
        retries: How often a failed one is tried again.
    """
    variables = frozenset(os.environ)
    jobs = {t.name: TrialJob(t.commands, t.log, stop, os.getcwd(), variables) for t in trials}
    trainable = tune.with_resources(tune.with_parameters(run_trial, jobs=jobs), {"cpu": 1})
    with tempfile.TemporaryDirectory(prefix="gflowvlm-tune-") as notes, _tune_environment(), _small_ray(concurrent):
        tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=notes,
                verbose=0,
                callbacks=[_Watch(on_step)],
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        ).fit()


@contextmanager
def _small_ray(concurrent: int) -> Iterator[None]:
    """A local Ray with a slot for each trial that runs at a time, and little else."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    start_local_ray(
        worker_environment(),
        num_cpus=concurrent,
        num_gpus=0,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
    )
    # Ray has put its own handler there, which ends the process.
    signal.signal(signal.SIGTERM, on_sigterm)
    # Failed trials are told of in a line each, by the caller.
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        ray.shutdown()


@contextmanager
def _tune_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _TUNE_ENVIRONMENT}
    os.environ.update(_TUNE_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
