"""The trials of an experiment: which runs there are, and what is left to do of each."""

import difflib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gflowvlm.evaluation.metrics import REPORT_SEED_OFFSET, EvaluationPlan
from gflowvlm.run.final_report import before_and_after
from gflowvlm.run.log import Row
from gflowvlm.run.models import resolve_model, shipped_models
from gflowvlm.run.preset_library import load_preset, preset_names, resolve_config
from gflowvlm.shared.config_io import dump_config, load_config
from gflowvlm.shared.errors import UserError
from gflowvlm.studies.experiments.description import Experiment, Scale, Variant, WarmStart
from gflowvlm.studies.experiments.sweep import SweepRun

LOG = "output.log"
"""In a run's folder: what its processes said."""

MODELS = "models"
"""Folder of the models that are made for an experiment, in its own folder, and of those that presets name."""

UNATTENDED = ("cluster.dashboard=false",)
"""Settings of every trial; the user's come after them."""


@dataclass(frozen=True)
class Command:
    """One step of a trial: a `gflowvlm` command.

    Attributes:
        arguments: The command and its arguments.
        result: The file that is there once it has been done.
        written: The file that it writes, renamed to `result` when it has ended well.
    """

    arguments: tuple[str, ...]
    result: Path
    written: Path


@dataclass(frozen=True)
class Trial:
    """One run of a variant with a seed, and its evaluations at other temperatures.

    Attributes:
        variant: What it is a run of.
        run: The run.
        temperatures: (split, temperature) of the evaluations that the run's own report lacks.
    """

    variant: Variant
    run: SweepRun
    temperatures: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """``VARIANT-SEED``, the name of its folder."""
        return self.run.folder.root.name

    @property
    def log(self) -> Path:
        """Where its processes write what they say."""
        return self.run.folder.root / LOG

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return len(self.commands) == 0

    @property
    def recorded(self) -> bool:
        """Whether it is finished and was run with its settings, wherever the experiment's folder stood then."""
        path, start = self.run.folder.config, _warm_start(self)
        if not path.exists() or not self.finished:
            return False
        config = load_config(path)
        if start is not None and Path(config.policy.model).parts[-2:] == (MODELS, start.name):
            policy = config.policy.model_copy(update={"model": self.run.config.policy.model})
            config = config.model_copy(update={"policy": policy})
        return dump_config(config) == dump_config(self.run.config)

    def prepare(self) -> None:
        """Makes the run's folder, or checks that the one there is its own.

        Raises:
            UserError: The folder there was made with other settings.
        """
        if not self.recorded:
            self.run.prepare()

    @property
    def commands(self) -> tuple[Command, ...]:
        """What is left to do, in order."""
        root, summary = self.run.folder.root, self.run.folder.summary
        train = Command(("train", "--resume", str(root)), summary, summary)
        every = (train, *(self._evaluation(*at) for at in self.temperatures))
        return tuple(command for command in every if not command.result.exists())

    def evaluation(self, split: str, temperature: float) -> Path:
        """Returns the file of an evaluation at another temperature."""
        return self.run.folder.root / f"evaluation-{split}-temperature-{temperature:g}.json"

    def report(self, split: str, before: bool) -> Row:
        """Returns the row of the run's final report for a split, of the policy before or after training.

        Raises:
            UserError: The report cannot be read.
        """
        path = self.run.folder.summary
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            played = before_and_after(summary["report"], summary["version"])[split]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: is no summary of a run ({error!r}); remove it and run again") from None
        row = played.before if before else played.after
        if row is None:
            raise UserError(f"{path}: lacks an evaluation of split {split}; remove it and run again")
        return row

    def _evaluation(self, split: str, temperature: float) -> Command:
        settings, result = self.run.config.evaluation, self.evaluation(split, temperature)
        # The instances of the run's own final report.
        plan = EvaluationPlan(
            split, settings.instances, settings.samples, settings.seed + REPORT_SEED_OFFSET, temperature
        )
        options = {
            "--split": split,
            "--instances": plan.instances,
            "--samples": plan.samples,
            "--seed": plan.seed,
            "--temperature": f"{temperature:g}",
            "--json": (written := result.with_suffix(".partial")),
        }
        said = (part for option, value in options.items() for part in (option, str(value)))
        return Command(("eval", str(self.run.folder.root), *said), result, written)


@dataclass(frozen=True)
class TrialList:
    """What an experiment comes to.

    Attributes:
        chosen: The trials asked for, seed after seed.
        left_out: A line for each reason to leave variants out, as a model that does not exist yet, with how many.
    """

    chosen: tuple[Trial, ...]
    left_out: tuple[str, ...]

    @property
    def warm_starts(self) -> tuple[tuple[WarmStart, Path], ...]:
        """The models that unfinished trials start from and that are made for the experiment, and their folders."""
        found = {
            start.name: (start, Path(trial.run.config.policy.model))
            for trial in self.chosen
            if not trial.run.finished and (start := _warm_start(trial)) is not None
        }
        return tuple(found.values())


@dataclass(frozen=True)
class Selection:
    """Which trials of an experiment are meant, and where they stand.

    Attributes:
        experiment: The experiment.
        scale: Which models and budgets.
        seeds: Runs of each variant, with seeds 0, 1, …
        only: Names or slugs of the variants to run; all where there is none.
        overrides: Settings of all runs, ``section.key=value``; they come after the variants'.
        out: The experiment's folder.
    """

    experiment: Experiment
    scale: Scale
    seeds: int
    only: tuple[str, ...]
    overrides: tuple[str, ...]
    out: Path

    def trials(self) -> TrialList:
        """Returns the trials, without those that something is missing for.

        Raises:
            UserError: `only` names no variant, or a setting does not fit.
        """
        variants = chosen_variants(self.experiment, self.only)
        missing = {variant.slug: reason for variant in variants if (reason := missing_part(variant, self.scale))}
        counts = Counter(missing.values())
        left_out = tuple(
            f"{reason}: {count * self.seeds} trials are left out ({count} variants)" for reason, count in counts.items()
        )
        there = [variant for variant in variants if variant.slug not in missing]
        return TrialList(tuple(self._trial(v, seed) for seed in range(self.seeds) for v in there), left_out)

    def finished(self) -> Iterator[Trial]:
        """Yields every finished trial with these settings in the folder, chosen now or in an earlier call."""
        for variant in self.experiment.variants:
            if missing_part(variant, self.scale) is None:
                for seed in _seeds_in(self.out, variant.slug):
                    trial = self._trial(variant, seed)
                    if trial.recorded:
                        yield trial

    def _trial(self, variant: Variant, seed: int) -> Trial:
        start = variant.warm_starts.get(self.scale)
        # Quoted: a folder's name may hold what means something else in YAML.
        model: tuple[str, ...] = ()
        if start is not None:
            model = (f"policy.model={json.dumps(str((self.out / MODELS / start.name).resolve()))}",)
        config = resolve_config(
            variant.preset(self.scale), None, [*UNATTENDED, *variant.overrides, *model, *self.overrides, f"seed={seed}"]
        )
        others = {(c.split, c.temperature): None for c in self.experiment.columns if c.temperature != 1.0}
        return Trial(variant, SweepRun.in_folder(self.out, variant.slug, config), tuple(others))


def chosen_variants(experiment: Experiment, only: Sequence[str]) -> list[Variant]:
    """Returns the variants of some names or slugs, all of them for none.

    Raises:
        UserError: A name is no variant's.
    """
    by_name = {name: variant for variant in experiment.variants for name in (variant.name, variant.slug)}
    for name in only:
        if name not in by_name:
            slugs = [variant.slug for variant in experiment.variants]
            close = difflib.get_close_matches(name, slugs, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(slugs)}"
            raise UserError(f"--only {name!r}: {experiment.name} has no such variant; {hint}")
    wanted = {by_name[name].slug for name in only}
    return [variant for variant in experiment.variants if not only or variant.slug in wanted]


def missing_part(variant: Variant, scale: Scale) -> str | None:
    """Returns why a variant has no runs, as a preset or model that does not exist yet; None where it has."""
    if scale in variant.missing:
        return variant.missing[scale]
    preset = variant.preset(scale)
    if preset not in preset_names():
        return f"the model and preset {preset!r} are not shipped yet"
    model = load_preset(preset).policy.model
    # A path or a hub name has a slash, and is the user's to provide.
    if "/" not in model and model not in shipped_models() and not Path(model).is_dir():
        return f"the model {model!r} of preset {preset!r} is not shipped yet"
    return None


def check_models(trials: Iterable[Trial]) -> None:
    """Loads the processor of each model that is not made for the experiment.

    Raises:
        UserError: A model is not there, or cannot be used.
    """
    # Brings transformers, which takes seconds.
    from gflowvlm.shared.policy_inputs import PolicyInputs

    configs = {t.run.config.policy.model: t.run.config for t in trials if _warm_start(t) is None}
    for model, config in configs.items():
        if Path(model).is_absolute() and not Path(model).is_dir():
            saving = " --lora-rank 64 --gradient-checkpointing --micro-batch 4"
            memory = saving if config.policy.gradient_checkpointing else ""
            raise UserError(
                f"policy.model = {model!r}: no such folder; make it: gflowvlm sft --task {config.task.name} --model "
                f"HUB/NAME --out {shlex.quote(model)} --dtype {config.policy.dtype} "
                f"--image-size {config.task.image_size}{memory}"
            )
        PolicyInputs.load(resolve_model(model))


def _warm_start(trial: Trial) -> WarmStart | None:
    """Returns the warm start that a trial's model is of, None where it is any other model."""
    model = Path(trial.run.config.policy.model)
    folder = trial.run.folder.root.parent / MODELS
    starts = trial.variant.warm_starts.values()
    return next((start for start in starts if folder / start.name == model), None)


def _seeds_in(out: Path, slug: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(slug)}-(\d+)")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))
