"""The presets that ship with the project: whole configurations by name."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from gflowvlm.run.paths import with_absolute_paths
from gflowvlm.shared.config import RunConfig
from gflowvlm.shared.config_io import load_config
from gflowvlm.shared.errors import UserError

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "numberline-tiny"


def preset_names() -> list[str]:
    """Returns the names of all presets, the default first."""
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    return sorted(names, key=lambda name: name != DEFAULT_PRESET)


def resolve_config(preset: str | None, config: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Returns the configuration that a command's options name, ready for a run on this machine.

    That is a file's, or a preset's (the default one's). Its paths are absolute: relative ones are those of the folder
    that the command was started in, also where a file has them.

    Raises:
        UserError: Both are given, there is no such preset or file, or an override does not fit.
    """
    return with_absolute_paths(named_config(preset, config, overrides))


def named_config(preset: str | None, config: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Returns the configuration that a command's options name, its paths as they stand there.

    Raises:
        UserError: As `resolve_config`.
    """
    if config is None:
        return load_preset(preset if preset is not None else DEFAULT_PRESET, overrides)
    if preset is not None:
        raise UserError("give --preset or --config, not both")
    return load_config(config, overrides)


def load_preset(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Returns a preset's configuration with dotted overrides applied.

    Raises:
        UserError: No such preset, or an override does not fit.
    """
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(names)}"
        raise UserError(f"preset {name!r}: no such preset; {hint}")
    return load_config(PRESETS / f"{name}.yaml", overrides)
