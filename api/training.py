"""Configurations and training from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gflowvlm.api.run import Run
from gflowvlm.api.training_process import train_to_the_end
from gflowvlm.run.paths import check_paths, with_absolute_paths
from gflowvlm.run.preset_library import DEFAULT_PRESET, PRESETS, load_preset, preset_names
from gflowvlm.run.setup import new_run, open_run
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import apply_changes, apply_overrides, load_yaml, overridden_keys, parse_config

Source = RunConfig | Mapping[str, Any] | str | Path
"""What a configuration is made from: one, a nested mapping, a preset's name, a YAML file or a run's folder."""

Overrides = Mapping[str, Any] | Iterable[str]
"""Settings to change: a mapping with dotted keys, or ``section.key=value`` as on the command line."""


def load_config(source: Source = DEFAULT_PRESET, overrides: Overrides = ()) -> RunConfig:
    """Returns a whole configuration, every setting checked.

    Args:
        source: A preset's name (`gflowvlm presets` lists them), a YAML file, the folder of a run, a nested mapping,
            or a configuration. What it leaves out has its default.
        overrides: Settings to change, with dotted keys.

    Raises:
        UserError: There is no such preset or file, or a setting is unknown, out of its bounds or does not fit the
            others; the message names it.

    Example:
        >>> config = gflowvlm.load_config("numberline-tiny", {"learner.steps": 20, "objective.loss": "subtb"})
        >>> config.learner.steps, config.objective.subtb_lambda
        (20, 0.9)
        >>> gflowvlm.load_config({"task": {"name": "blackjack"}}).task.name
        'blackjack'
    """
    settings, where = _settings(source)
    if isinstance(overrides, Mapping):
        paths_as_text = {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}
        return parse_config(apply_changes(settings, paths_as_text), where, overrides)
    written = [overrides] if isinstance(overrides, str) else list(overrides)
    return parse_config(apply_overrides(settings, written), where, overridden_keys(written))


def train(
    source: Source = DEFAULT_PRESET,
    overrides: Overrides = (),
    *,
    run: Path | str | None = None,
    progress: bool = True,
) -> Run:
    """Trains a policy to the last learner step, and returns the run.

    It is `gflowvlm train` in a process of its own: it can be called several times, from a notebook and from any
    thread. Ctrl-C (a notebook's stop button) ends the process and leaves a run that `gflowvlm.Run.resume` goes on
    with; it ends with the process that called it too.

    Args:
        source: What to train, as in `gflowvlm.load_config`.
        overrides: Settings to change, with dotted keys.
        run: Folder of the new run; by default ``runs/NAME-DATE-TIME``.
        progress: Whether to print what the command says.

    Relative paths in the configuration start at the folder that the process stands in.

    Raises:
        UserError: The configuration, the machine or the folder does not fit; the message says what to do.
        KeyboardInterrupt: It was stopped and can go on.

    Example:
        >>> run = gflowvlm.train(
        ...     "numberline-tiny",
        ...     {"learner.steps": 2, "evaluation.instances": 2, "sampler.engine": "transformers"},
        ...     run=folder,
        ...     progress=False,
        ... )  # doctest: +TRAINS
        >>> len(run.metrics())  # doctest: +TRAINS
        2
    """
    from gflowvlm.actors.demonstration_set import DemonstrationSet
    from gflowvlm.cluster.launch.known_memory import known_memory
    from gflowvlm.evaluation.model_check.report import require_trainable

    config = with_absolute_paths(load_config(source, overrides))
    check_paths(config)
    # What would fail minutes later is looked at before there is a folder.
    require_trainable(config, known_memory(config))
    DemonstrationSet.of_run(config)
    folder = new_run(config, None if run is None else Path(run).expanduser())
    train_to_the_end(folder, progress=progress)
    return Run(folder.root)


def _settings(source: Source) -> tuple[dict[str, Any], str]:
    """Returns nested settings, and what to call them in an error.

    Raises:
        UserError: There is no such preset or file.
    """
    if isinstance(source, RunConfig):
        return source.model_dump(mode="json"), "configuration"
    if isinstance(source, Mapping):
        return dict(source), "configuration"
    path = Path(source).expanduser()
    if isinstance(source, str) and source in preset_names():
        return load_yaml(PRESETS / f"{source}.yaml"), f"preset {source!r}"
    if path.is_dir():
        return open_run(path)[1].model_dump(mode="json"), str(path)
    if isinstance(source, Path) or path.suffix in (".yaml", ".yml") or path.is_file():
        return load_yaml(path), str(path)
    # Says what there is instead.
    return load_preset(source).model_dump(mode="json"), source
