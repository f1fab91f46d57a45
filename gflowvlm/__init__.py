"""GFlowVLM: distributed GFlowNet fine-tuning of vision-language models.

The names below are the Python interface; the command line is ``gflowvlm COMMAND``. Importing this package is quick:
what a name needs (torch, pandas, Ray) is imported when the name is first used.

Example:
    >>> import gflowvlm
    >>> run = gflowvlm.Run(path)
    >>> run.evaluations()[["step", "success"]].shape[1]
    2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Makes the shipped tasks known in every process that imports anything of the package.
import gflowvlm.envs as _envs  # noqa: F401

# Makes the folder of own code known in every process that a run has named one to.
import gflowvlm.shared.user_code as _user_code  # noqa: F401

if TYPE_CHECKING:
    from gflowvlm import losses as losses
    from gflowvlm.api.policy import Policy as Policy
    from gflowvlm.api.run import Run as Run
    from gflowvlm.api.training import load_config as load_config
    from gflowvlm.api.training import train as train
    from gflowvlm.api.trajectories import Trajectories as Trajectories
    from gflowvlm.shared.config import RunConfig as RunConfig
    from gflowvlm.shared.errors import UserError as UserError
    from gflowvlm.shared.trajectory import Trajectory as Trajectory

    __version__: str

__all__ = [
    "Policy",
    "Run",
    "RunConfig",
    "Trajectories",
    "Trajectory",
    "UserError",
    "load_config",
    "losses",
    "train",
]

_MODULES = {
    "Policy": "gflowvlm.api.policy",
    "Run": "gflowvlm.api.run",
    "RunConfig": "gflowvlm.shared.config",
    "Trajectories": "gflowvlm.api.trajectories",
    "Trajectory": "gflowvlm.shared.trajectory",
    "UserError": "gflowvlm.shared.errors",
    "load_config": "gflowvlm.api.training",
    "train": "gflowvlm.api.training",
}
"""Where each name is defined."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from gflowvlm.version import version

        value: Any = version()
    elif name == "losses":
        value = import_module("gflowvlm.losses")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})
