"""A run's folder as an object."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gflowvlm.api.training_process import train_to_the_end
from gflowvlm.api.trajectories import Filters, Trajectories
from gflowvlm.envs.base import SPLITS
from gflowvlm.evaluation.playing import best_version
from gflowvlm.run.adapters import adapter_versions, published_adapter
from gflowvlm.run.console import terminal
from gflowvlm.run.log import Row, read_rows
from gflowvlm.run.setup import open_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.errors import UserError
from gflowvlm.shared.instances import EVALUATION_SEEDS
from gflowvlm.shared.trajectory import BASE_VERSION

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from gflowvlm.api.policy import Policy

Version = int | Literal["best", "newest"] | None
"""A policy version: its number (0 is the base model), ``"newest"``, or ``"best"``, which None stands for too."""

EVALUATION_SEED = 20_000_033
"""First instance of `Run.evaluate`: neither of training nor of the run's own evaluations."""


class Run:
    """A run, finished or not, as its folder holds it. Everything is read when it is asked for.

    Example:
        >>> run = gflowvlm.Run(path)
        >>> run.config.task.name
        'numberline'
        >>> run.finished
        True
        >>> float(run.metrics()["loss"].iloc[-1]) >= 0
        True
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Opens a run.

        Args:
            path: The run's folder.

        Raises:
            UserError: There is no run in it, or its configuration cannot be read.
        """
        self._folder, self._config = open_run(Path(path).expanduser())

    @property
    def path(self) -> Path:
        """The run's folder; what it holds is described in docs/quickstart.md."""
        return self._folder.root

    @property
    def config(self) -> RunConfig:
        """Its whole configuration."""
        return self._config

    @property
    def finished(self) -> bool:
        """Whether it has come to its last learner step and its final evaluations."""
        return self._folder.summary.exists()

    @property
    def versions(self) -> list[int]:
        """The policy versions whose adapters are in the folder, the oldest first; the base model, 0, is not listed."""
        return adapter_versions(self._folder)

    def metrics(self, kind: Literal["step", "rollout"] = "step") -> pd.DataFrame:
        """Returns what the run has logged; docs/metrics.md says what every column is.

        Args:
            kind: ``step``: one row a learner step, indexed by it, steps that were undone left out. ``rollout``: the
                snapshots of rollouts, buffer and throughput that are taken every few seconds.

        Raises:
            UserError: There is no such kind.

        Example:
            >>> gflowvlm.Run(path).metrics()[["loss", "batch_success"]].index.name
            'step'
        """
        from gflowvlm.api.tables import rollout_frame, step_frame

        if kind not in ("step", "rollout"):
            raise UserError(f"metrics {kind!r}: there are no such rows; use 'step' or 'rollout'")
        return step_frame(self._rows()) if kind == "step" else rollout_frame(self._rows())

    def evaluations(self) -> pd.DataFrame:
        """Returns the run's own evaluations, in order: while it trained and, where ``final``, at its end.

        The final ones are of the base model and of the best adapter, on instances that neither training nor the
        choice of the adapter has seen.

        Example:
            >>> evaluations = gflowvlm.Run(path).evaluations()
            >>> evaluations[evaluations["final"]]["split"].tolist()
            ['id', 'id', 'ood', 'ood']
        """
        from gflowvlm.api.tables import evaluation_frame

        return evaluation_frame(self._rows())

    def trajectories(
        self,
        *,
        success: bool | None = None,
        expert: bool | None = None,
        split: str | None = None,
        version: int | None = None,
        min_version: int | None = None,
        instance: int | None = None,
        group: str | int | None = None,
        end: str | None = None,
        validity: str | None = None,
    ) -> Trajectories:
        """Returns the trajectories that it learned from, or those of them that fit; None leaves a property open.

        Args:
            success: Whether they solved the task.
            expert: Whether the expert made them.
            split: ``id`` or ``ood``.
            version: A policy version that answered at least one of their steps.
            min_version: The oldest policy version that may have answered a step.
            instance: Seed of the task instance.
            group: A group's id or number.
            end: Why they ended: ``done``, ``environment``, ``invalid`` or ``step_limit``.
            validity: What became of at least one response: ``valid``, ``malformed`` or ``inadmissible``.

        Raises:
            UserError: There are none in the folder, a file is damaged, or a value does not exist.

        Example:
            >>> solved = gflowvlm.Run(path).trajectories(success=True, expert=False)
            >>> {trajectory.success for trajectory in solved}
            {True}
        """
        return Trajectories(
            self._folder.root,
            Filters(
                success=success,
                expert=expert,
                split=split,
                version=version,
                min_version=min_version,
                instance=instance,
                group=None if group is None else str(group),
                end=end,
                validity=validity,
            ),
        )

    def adapter(self, version: Version = None) -> Path | None:
        """Returns the folder of an adapter, in PEFT format; None where the version is the base model.

        Args:
            version: Its number, ``"newest"``, or ``"best"``: the one that evaluated best. None is the best.

        Raises:
            UserError: There is no such adapter.

        Example:
            >>> folder = gflowvlm.Run(path).adapter("newest")
            >>> sorted(file.name for file in folder.iterdir())
            ['adapter_config.json', 'adapter_model.safetensors']
        """
        number = self._number(version)
        return None if number == BASE_VERSION else self._folder.adapter(number)

    def policy(self, version: Version = None) -> Policy:
        """Returns a policy of the run, to score trajectories and to answer prompts.

        Args:
            version: As in `adapter`; 0 is the base model.

        Raises:
            UserError: There is no such version.

        Example:
            >>> gflowvlm.Run(path).policy(0)
            <policy numberline-tiny, base model>
        """
        from gflowvlm.api.policy import Policy

        number = self._number(version)
        return Policy(self._config, number, None if number == BASE_VERSION else self._folder.adapter(number))

    def evaluate(
        self,
        *,
        split: str = "id",
        instances: int = 100,
        samples: int = 8,
        seed: int = EVALUATION_SEED,
        temperature: float = 1.0,
        version: Version = None,
        engine: Literal["vllm", "transformers"] | None = None,
        exact: bool = False,
        exact_instances: int = 4,
        progress: bool = False,
    ) -> pd.Series:
        """Plays instances that training never sees, in this process, and returns figures as in `evaluations`.

        Args:
            split: ``id`` (as in training) or ``ood``.
            instances: Task instances.
            samples: N of Div@N: trajectories of each.
            seed: Seed of the first instance.
            temperature: Sampling temperature; the greedy success stands beside it.
            version: As in `adapter`.
            engine: What samples; the run's ``sampler.engine`` by default. ``transformers`` starts faster, ``vllm``
                plays faster; it starts processes, so a script calls this under ``if __name__ == "__main__":``.
            exact: Whether to add the exact match to the target R^β / Z and to what training aims at, before
                (``exact_base_…``) and after (``exact_…``): the fields of `gflowvlm.evaluation.exact_match.ExactMatch`.
                It takes some seconds an instance.
            exact_instances: Instances of which every action sequence is followed.
            progress: Whether to show how far it is.

        Raises:
            UserError: There is no such split, version or engine, the sampler fails, or the tree of action sequences
                is too large to be exact.

        Example:
            >>> figures = gflowvlm.Run(path).evaluate(instances=2, samples=2, engine="transformers")
            >>> 0 <= figures["success"] <= 1
            True
        """
        from gflowvlm.api.tables import figures_row
        from gflowvlm.evaluation.metrics import EvaluationPlan
        from gflowvlm.evaluation.run_evaluation import evaluate_run

        if split not in SPLITS:
            raise UserError(f"split {split!r}: there is no such split; use {' or '.join(SPLITS)}")
        if engine not in (None, "vllm", "transformers"):
            raise UserError(f"engine {engine!r}: there is no such engine; use vllm or transformers")
        for name, number in (("instances", instances), ("samples", samples), ("exact_instances", exact_instances)):
            if number < 1:
                raise UserError(f"{name} {number!r}: must be at least 1")
        if not 0 <= seed <= EVALUATION_SEEDS.stop - instances - exact_instances:
            raise UserError(f"seed {seed!r}: must be from 0 to below {EVALUATION_SEEDS.stop} with all instances")
        if not 0 < temperature <= 2:
            raise UserError(f"temperature {temperature!r}: must be above 0 and at most 2")
        number = self._number(version)
        console = terminal(quiet=not progress)
        matches = self._exact(number, split, seed, exact_instances, console) if exact else {}
        plan = EvaluationPlan(split, instances, samples, seed, temperature)
        figures = evaluate_run(self._folder.root, plan, version=number, engine=engine, console=console)
        return figures_row({**figures, **matches})

    def plot(self) -> Figure:
        """Returns the learning curve as a matplotlib figure; a notebook shows it, ``savefig`` writes it.

        Example:
            >>> gflowvlm.Run(path).plot().savefig("curve.png")
        """
        from gflowvlm.api.plot import learning_curve

        return learning_curve(self._rows(), self.path.name)

    def resume(self, *, progress: bool = True) -> Run:
        """Goes on with a run that was stopped, to its last learner step, and returns it; see `gflowvlm.train`.

        Args:
            progress: Whether to print what the command says.

        Raises:
            UserError: It has ended, another process is running it, or the machine does not fit.
            KeyboardInterrupt: It was stopped again.

        Example:
            >>> gflowvlm.Run(path).resume()
            Traceback (most recent call last):
            gflowvlm.shared.errors.UserError: ...: this run has ended; ...
        """
        if self.finished:
            raise UserError(f"{self.path}: this run has ended; look at it with its metrics(), or evaluate() it")
        train_to_the_end(self._folder, progress=progress)
        return Run(self.path)

    def __repr__(self) -> str:
        config, rows = self._config, self._rows()
        step = max((row["step"] for row in rows if row["kind"] == "step"), default=0)
        state = "finished" if self.finished else "not finished"
        what = f"{config.task.name}, {config.objective.loss}, step {step} of {config.learner.steps}, {state}"
        return f"<run {str(self.path)!r}: {what}>"

    def _rows(self) -> list[Row]:
        return read_rows(self._folder.metrics)

    def _number(self, version: Version) -> int:
        """Returns a version as its number.

        Raises:
            UserError: There is no such version.
        """
        if version in (None, "best"):
            number = best_version(self._folder)
        elif version == "newest":
            number = max(self.versions, default=BASE_VERSION)
        elif isinstance(version, int):
            number = version
        else:
            raise UserError(f"version {version!r}: use a number, 'best' or 'newest'")
        if number != BASE_VERSION:
            published_adapter(self._folder, number)
        return number

    def _exact(self, version: int, split: str, seed: int, instances: int, console: Any) -> Row:
        from gflowvlm.evaluation.exact_check import ExactCheck

        check = ExactCheck(self._config, split=split, seed=seed, instances=instances, console=console)
        if check.base is None:
            raise UserError("exact=True: the tree of action sequences is too large to be followed; leave it out")
        match = check.base if version == BASE_VERSION else check.measure(self._folder.adapter(version))
        return {f"exact_base_{name}": value for name, value in check.base.as_dict().items()} | {
            f"exact_{name}": value for name, value in match.as_dict().items()
        }
